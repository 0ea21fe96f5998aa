"""A miniature testbed, trained once per session: two layers, three languages, some hundred steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.corpus import Corpus, load_corpus
from qscope_posttrain.testbed.grammar import write_paragraphs
from qscope_posttrain.testbed.tokenizer import train_tokenizer
from qscope_posttrain.testbed.windows import WindowMaker

LANGUAGES = ("en", "ru", "zh")
CHARACTERS = {"en": 45_000, "ru": 40_000, "zh": 22_000}


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for language in LANGUAGES:
        text = "\n".join(write_paragraphs(language, CHARACTERS[language], seed=3))
        (folder / f"{language}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(corpus_folder: Path) -> Corpus:
    return load_corpus(corpus_folder)


@pytest.fixture(scope="session")
def tokenizer(corpus: Corpus):
    return train_tokenizer(corpus, vocabulary=700)


@pytest.fixture(scope="session")
def maker(corpus: Corpus, tokenizer) -> WindowMaker:
    return WindowMaker.build(corpus, tokenizer, length=48, prompt=12)


@pytest.fixture(scope="session")
def small_config(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TestbedConfig:
    return TestbedConfig(
        corpus=str(corpus_folder),
        vocabulary=700,
        window=48,
        prompt=12,
        hidden_size=64,
        model_layers=2,
        heads=2,
        pretraining_steps=220,
        pretraining_learning_rate=4e-3,
        switch=0.3,
        sae_layers=2,
        sae_expansion=4,
        sae_k=16,
        sae_steps=60,
        sae_windows=200,
        feature_windows=90,
        top=8,
        seeds=[1],
        sft_windows=192,
        sft_learning_rate=5e-4,
        evaluation_windows=60,
        sampled_prompts=24,
        sampled_tokens=16,
        workers=1,
        cache=str(tmp_path_factory.mktemp("cache")),
    )
