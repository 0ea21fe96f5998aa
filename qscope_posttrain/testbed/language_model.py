"""The corpus, the tokenizer and the language model of a testbed, made once and kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from qscope_posttrain.testbed.cache import Cache
from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.cores import worker_count
from qscope_posttrain.testbed.corpus import Corpus, generate_corpus, load_corpus, load_files
from qscope_posttrain.testbed.distinctive import distinctive_tokens
from qscope_posttrain.testbed.model import build_model
from qscope_posttrain.testbed.pretrain import pretrain
from qscope_posttrain.testbed.shared_training import SHARDS
from qscope_posttrain.testbed.tokenizer import decode, separator_id, train_tokenizer
from qscope_posttrain.testbed.windows import EncodedText, WindowMaker
from qscope_posttrain.text.scripts import target_script
from qscope_posttrain.text.tokens import script_token_ids

_SOURCES = ("testbed/corpus.py", "testbed/grammar.py", "testbed/lexicon")
_MODEL_SOURCES = (
    "testbed/tokenizer.py", "testbed/windows.py", "testbed/model.py", "testbed/pretrain.py",
    "testbed/shared_training.py", "testbed/distinctive.py",
)  # fmt: skip
_SETTINGS = (
    "target", "vocabulary", "window", "prompt", "hidden_size", "model_layers", "heads", "pretraining_steps",
    "pretraining_batch_size", "pretraining_learning_rate", "switch", "model_seed", "identify", "device",
)  # fmt: skip


@dataclass(frozen=True)
class LanguageModel:
    """A pretrained testbed model with everything needed to draw windows for it."""

    model: PreTrainedModel
    """In eval mode."""
    tokenizer: PreTrainedTokenizerFast
    maker: WindowMaker
    """Draws windows of every split."""
    target_tokens: Tensor
    """int64 ids of the vocabulary entries that betray the target: those that write its script, or, identified by words,
    those that are distinctive of its pretraining text (see `distinctive_tokens`)."""
    losses: tuple[float, ...]
    """Pretraining loss of every step."""
    folder: Path
    """Where it lies."""
    key: str
    """Its key in the cache."""

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.maker.encoded["pre"])

    @property
    def sources(self) -> tuple[str, ...]:
        """All languages but the target."""
        return tuple(language for language in self.languages if language != self.maker.target)

    def texts(self, split: str, count: int, seed: int, switch: float = 0.0) -> dict[str, list[str]]:
        """Dialogue windows as strings, by language: text for passes that tokenise for themselves."""
        windows = self.maker.dialogue(split, count, seed, switch)
        texts: dict[str, list[str]] = {language: [] for language in self.languages}
        for language, row in zip(windows.languages, windows.input_ids, strict=True):
            # A window may end within a character.
            texts[language].append(decode(self.tokenizer, row).rstrip("\N{REPLACEMENT CHARACTER}"))
        return texts


def open_corpus(config: TestbedConfig, cache: Cache) -> Corpus:
    """The user's corpus, or the generator's, written to the cache first."""
    files, by_script = config.text_files(), config.identify == "script"
    if files is not None:
        return load_files(files, config.target, by_script=by_script)
    folder = config.corpus
    if folder is None:
        key = cache.key(config.subset("corpus_scale"), _SOURCES)
        folder = str(cache.folder("corpus", key, lambda place: _generate(place, config.corpus_scale)))
    return load_corpus(folder, config.languages, config.target, by_script=by_script)


def make_language_model(config: TestbedConfig, cache: Cache) -> LanguageModel:
    """Pretrain the model, or take it from the cache."""
    corpus = open_corpus(config, cache)
    key = cache.key(config.subset(*_SETTINGS), (*_SOURCES, *_MODEL_SOURCES), [corpus.fingerprint])
    folder = cache.folder("language-model", key, lambda place: _build(config, corpus, place))
    return load_language_model(folder, key, config)


def load_language_model(folder: Path, key: str, config: TestbedConfig) -> LanguageModel:
    """Read what `make_language_model` has left in `folder`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with np.load(folder / "encoded.npz") as arrays:
        encoded: dict[str, dict[str, EncodedText]] = {}
        for name in arrays.files:
            split, language, part = name.split("/")
            if part == "tokens":
                text = EncodedText(arrays[name], arrays[f"{split}/{language}/boundaries"])
                encoded.setdefault(split, {})[language] = text
    separator = separator_id(tokenizer)
    maker = WindowMaker(encoded, separator, config.target, config.window, config.prompt)
    losses = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    if config.identify == "script":
        tokens = script_token_ids(tokenizer, target_script(config.target))
    else:
        tokens = distinctive_tokens({name: text.tokens for name, text in encoded["pre"].items()}, config.target)
    with no_progress_bars():
        model = Qwen3ForCausalLM.from_pretrained(folder, device_map=config.torch_device()).eval()
    return LanguageModel(model, tokenizer, maker, tokens, tuple(losses), folder, key)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer in the format of transformers, silently."""
    with no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """A model of four megabytes needs no bar of its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _generate(folder: Path, scale: float) -> None:
    generate_corpus(folder, scale=scale)


def _build(config: TestbedConfig, corpus: Corpus, folder: Path) -> None:
    tokenizer = train_tokenizer(corpus, config.vocabulary)
    maker = WindowMaker.build(corpus, tokenizer, config.window, config.prompt)
    count = config.pretraining_steps * config.pretraining_batch_size
    windows = maker.pretraining(count, config.switch, config.model_seed)
    model = build_model(
        tokenizer, config.hidden_size, config.model_layers, config.heads, config.window, config.model_seed
    )
    device = config.torch_device()
    nn.Module.to(model, device)  # transformers' own `to` is wrapped in a way that hides its type
    losses = pretrain(model, windows, config, worker_count(config.workers, SHARDS) if device == "cpu" else 1)
    save_model(model, tokenizer, folder)
    (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    arrays: dict[str, Any] = {}
    for split, part in maker.encoded.items():
        for language, text in part.items():
            arrays[f"{split}/{language}/tokens"] = text.tokens
            arrays[f"{split}/{language}/boundaries"] = text.boundaries
    np.savez(folder / "encoded.npz", **arrays)
