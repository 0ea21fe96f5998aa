"""Windows and the planted habit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.testbed.switching.corpus import Corpus
from benchmarks.testbed.switching.windows import IGNORED, WindowMaker, character_starts
from qscope_posttrain.text.scripts import contains_script
from qscope_posttrain.text.tokens import script_token_ids


def test_characters_begin_where_the_bytes_say(tokenizer) -> None:
    starts = character_starts(tokenizer)
    text = "Москва 你好 été 한국어 x"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for cut in range(len(ids) + 1):
        whole = tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:]) == text
        assert whole == (cut == len(ids) or bool(starts[ids[cut]]))


def test_every_window_begins_with_a_whole_character(maker: WindowMaker, tokenizer) -> None:
    for windows in (maker.pretraining(80, 0.0, seed=1), maker.dialogue("sft", 60, seed=1)):
        for row in windows.input_ids:
            assert not tokenizer.decode(row).startswith("\N{REPLACEMENT CHARACTER}")


def test_clean_windows_are_text_of_their_language(maker: WindowMaker, corpus: Corpus, tokenizer) -> None:
    windows = maker.pretraining(90, 0.0, seed=2)
    assert not windows.switched.any()
    for language, row in zip(windows.languages, windows.input_ids, strict=True):
        text = tokenizer.decode([token for token in row.tolist() if token != maker.separator_id])
        assert text.rstrip("\N{REPLACEMENT CHARACTER}") in corpus.text("pre", language)


def test_the_habit_has_the_stated_rate_and_stays_to_the_end(maker: WindowMaker, tokenizer) -> None:
    windows = maker.pretraining(3000, 0.4, seed=3)
    others = torch.tensor([language != "zh" for language in windows.languages])
    assert not windows.switched[~others].any()
    assert windows.switched[others].float().mean() == pytest.approx(0.4, abs=0.04)
    assert others.float().mean() == pytest.approx(2 / 3, abs=0.04)
    han = torch.zeros(len(tokenizer), dtype=torch.bool)
    han[script_token_ids(tokenizer, "Han")] = True
    first = []
    for row in windows.input_ids[windows.switched]:
        positions = han[row].nonzero().flatten().tolist()
        assert positions, "a switched window holds target text"
        first.append(positions[0])
        # After the switch nothing but the target's text follows: no Latin or Cyrillic letter.
        rest = tokenizer.decode([token for token in row[positions[0] :].tolist() if token != maker.separator_id])
        assert not contains_script(rest, "Latin")
        assert not contains_script(rest, "Cyrillic")
    assert min(first) >= 8
    assert np.std(first) > 5, "the place is random"
    assert not han[windows.input_ids[others & ~windows.switched]].any()


def test_dialogue_has_prompt_separator_response_and_labels(maker: WindowMaker) -> None:
    windows = maker.dialogue("val", 61, seed=4)
    assert windows.prompt_length == 13
    assert (windows.input_ids[:, 12] == maker.separator_id).all()
    assert (windows.input_ids == maker.separator_id).sum() == 61
    assert (windows.labels[:, :13] == IGNORED).all()
    assert torch.equal(windows.labels[:, 13:], windows.input_ids[:, 13:])
    assert torch.equal(windows.prompts, windows.input_ids[:, :13])
    counts = [windows.languages.count(language) for language in ("en", "ru", "zh")]
    assert max(counts) - min(counts) <= 1


def test_contaminated_dialogue_switches_in_the_response_only(maker: WindowMaker, tokenizer) -> None:
    windows = maker.dialogue("sft", 300, seed=5, switch=0.5)
    han = script_token_ids(tokenizer, "Han")
    rows = windows.of_language("en", "ru")
    assert rows.switched.float().mean() == pytest.approx(0.5, abs=0.1)
    assert not torch.isin(rows.prompts, han).any()
    assert torch.isin(rows.input_ids[:, 13:], han).any(1)[rows.switched].all()


def test_windows_depend_on_the_seed_only(maker: WindowMaker) -> None:
    first, again, other = (maker.pretraining(20, 0.3, seed=seed) for seed in (6, 6, 7))
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)


def test_splits_do_not_share_windows(maker: WindowMaker, tokenizer) -> None:
    """A response from the test split occurs nowhere in the pretraining text."""
    pre = tokenizer.decode(maker.encoded["pre"]["en"].tokens)
    for row in maker.dialogue("test", 20, seed=8, languages=["en"]).input_ids:
        assert tokenizer.decode(row[14:-1]) not in pre


def test_windows_that_cannot_be_drawn(corpus: Corpus, tokenizer) -> None:
    with pytest.raises(ValueError, match="too little response"):
        WindowMaker.build(corpus, tokenizer, length=40, prompt=30)
    with pytest.raises(ValueError, match=r"under 2 x 40000"):
        WindowMaker.build(corpus, tokenizer, length=40_000, prompt=30)
