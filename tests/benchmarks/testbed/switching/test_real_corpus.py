"""The testbed on real text, where it is present."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.testbed.switching.corpus import SPLITS, load_corpus
from benchmarks.testbed.switching.windows import WindowMaker, train_tokenizer
from qscope_posttrain.text.tokens import script_token_ids

FOLDER = Path(__file__).resolve().parents[5] / "shared" / "data" / "react_docs"

pytestmark = [
    pytest.mark.slow,  # a tokenizer trained on megabytes; test_corpus.py and test_windows.py have small ones
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"real text is not at {FOLDER}"),
]


def test_real_text_is_filtered_split_and_windowed() -> None:
    corpus = load_corpus(FOLDER)
    assert corpus.languages == ("en", "fr", "ko", "ru", "zh")
    for language in corpus.languages:
        parts = [set(corpus.splits[split][language]) for split in SPLITS]
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert all(parts)
    tokenizer = train_tokenizer(corpus, vocabulary=3000)
    han = script_token_ids(tokenizer, "Han")
    assert 500 < len(han) < 1500
    maker = WindowMaker.build(corpus, tokenizer, length=96, prompt=32)
    sizes = {language: len(text.tokens) for language, text in maker.encoded["pre"].items()}
    assert 250_000 < sizes["en"] < 400_000
    assert 60_000 < sizes["ru"] < 130_000
    others = maker.dialogue("test", 100, seed=1, languages=corpus.languages[:-1])
    assert not set(others.input_ids.flatten().tolist()) & set(han.tolist())
