"""A miniature world of the switching task, trained once per session, and a random model of the repetition task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.testbed.models import LanguageModel, build_model
from benchmarks.testbed.repetition.task import build_tokenizer
from benchmarks.testbed.switching.config import SwitchingConfig
from benchmarks.testbed.switching.corpus import Corpus, load_corpus
from benchmarks.testbed.switching.grammar import write_paragraphs
from benchmarks.testbed.switching.windows import WindowMaker, train_tokenizer

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
def small_config(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SwitchingConfig:
    return SwitchingConfig(
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


@pytest.fixture
def tiny() -> LanguageModel:
    """Two layers of width 16 of the repetition task, weights large enough that no distribution is flat."""
    tokenizer = build_tokenizer()
    model = build_model(
        tokenizer, hidden_size=16, intermediate_size=24, layers=2, heads=2, key_value_heads=2, positions=512,
        rope_theta=1000.0, tied=False, seed=0,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return LanguageModel(model, tokenizer, (), Path(), "")
