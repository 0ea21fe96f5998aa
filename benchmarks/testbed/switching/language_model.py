"""The corpus, the tokenizer and the language model of the switching task, made once and kept in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.testbed.cache import Artefact, Cache
from benchmarks.testbed.models import LanguageModel, build_model, load_language_model, save_model
from benchmarks.testbed.pretraining import SHARDS, Schedule, pretrain
from benchmarks.testbed.switching.config import SwitchingConfig
from benchmarks.testbed.switching.corpus import Corpus, generate_corpus, load_corpus, load_files
from benchmarks.testbed.switching.windows import EncodedText, WindowMaker, decode, separator_id, train_tokenizer
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.text.scripts import target_script
from qscope_posttrain.text.tokens import script_token_ids

# Raise these when the same settings would give another text (grammar, lexicon) or another model (tokenizer, windows,
# architecture, pretraining).
CORPUS_VERSION = "1"
MODEL_VERSION = "1"
_SETTINGS = (
    "target", "vocabulary", "window", "prompt", "hidden_size", "model_layers", "heads", "pretraining_steps",
    "pretraining_batch_size", "pretraining_learning_rate", "switch", "model_seed", "identify", "device",
)  # fmt: skip
_LEAST_COUNT = 5


@dataclass(frozen=True)
class SwitchingModel(LanguageModel):
    """A pretrained model with everything needed to draw windows for it."""

    maker: WindowMaker
    """Draws windows of every split."""
    target_tokens: Tensor
    """int64 ids of the vocabulary entries that betray the target: those that write its script, or, identified by words,
    those that are distinctive of its pretraining text (see `distinctive_tokens`)."""

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages, the target last."""
        return tuple(self.maker.encoded["pre"])

    @property
    def sources(self) -> tuple[str, ...]:
        """All languages but the target."""
        return tuple(language for language in self.languages if language != self.maker.target)

    def texts(self, split: str, count: int, seed: int, switch: float = 0.0) -> dict[str, list[str]]:
        """Draw dialogue windows as strings, by language, for passes that tokenize for themselves."""
        windows = self.maker.dialogue(split, count, seed, switch)
        texts: dict[str, list[str]] = {language: [] for language in self.languages}
        for language, row in zip(windows.languages, windows.input_ids, strict=True):
            # A window may end within a character.
            texts[language].append(decode(self.tokenizer, row).rstrip("\N{REPLACEMENT CHARACTER}"))
        return texts


def open_corpus(config: SwitchingConfig, cache: Cache) -> Corpus:
    """Read the user's corpus, or the generator's, which is written to the cache first."""
    files, by_script = config.text_files(), config.identify == "script"
    if files is not None:
        return load_files(files, config.target, by_script=by_script)
    folder: str | Path | None = config.corpus
    if folder is None:
        settings = config.subset(["corpus_scale"])
        folder = cache.make(
            "corpus", CORPUS_VERSION, settings, lambda place: generate_corpus(place, scale=config.corpus_scale)
        ).folder
    return load_corpus(folder, config.languages, config.target, by_script=by_script)


def make_language_model(config: SwitchingConfig, cache: Cache) -> SwitchingModel:
    """Pretrain the model, or take it from the cache."""
    corpus = open_corpus(config, cache)
    made = cache.make(
        "switching-model",
        MODEL_VERSION,
        config.subset(_SETTINGS),
        lambda place: _build(config, corpus, place),
        [corpus.fingerprint],
    )
    return load_switching_model(made, config)


def load_switching_model(place: Artefact, config: SwitchingConfig) -> SwitchingModel:
    """Load what `make_language_model` has left in a folder."""
    base = load_language_model(*place, config.torch_device())
    with np.load(place.folder / "encoded.npz") as arrays:
        encoded: dict[str, dict[str, EncodedText]] = {}
        for name in arrays.files:
            split, language, part = name.split("/")
            if part == "tokens":
                text = EncodedText(arrays[name], arrays[f"{split}/{language}/boundaries"])
                encoded.setdefault(split, {})[language] = text
    maker = WindowMaker(encoded, separator_id(base.tokenizer), config.target, config.window, config.prompt)
    if config.identify == "script":
        tokens = script_token_ids(base.tokenizer, target_script(config.target))
    else:
        tokens = distinctive_tokens({name: text.tokens for name, text in encoded["pre"].items()}, config.target)
    return SwitchingModel(**vars(base), maker=maker, target_tokens=tokens)


def distinctive_tokens(tokens: Mapping[str, np.ndarray], target: str, ratio: float = 20.0) -> Tensor:
    """Return the tokens at least `ratio` times as frequent in the target as in each other text, ascending.

    This is the list of tokens for a language or register without a script of its own. Frequencies are
    (count + 1/2) / (tokens + 1/2 per entry); a token needs at least 5 occurrences in the target.

    `tokens` holds the token ids of each text by name. ValueError if no token is distinctive.
    """
    others = [name for name in tokens if name != target]
    if target not in tokens or not others:
        raise UserValueError(f"distinctive tokens of {target!r} need its text and another, got {sorted(tokens)}")
    size = 1 + max(int(ids.max()) for ids in tokens.values())
    counts = {name: np.bincount(ids, minlength=size) for name, ids in tokens.items()}
    frequency = {name: (count + 0.5) / (count.sum() + 0.5 * size) for name, count in counts.items()}
    rival = np.max([frequency[name] for name in others], axis=0)
    found = np.flatnonzero((frequency[target] >= ratio * rival) & (counts[target] >= _LEAST_COUNT))
    if not found.size:
        raise UserValueError(f"no token is {ratio:g} times as frequent in {target!r} as in {', '.join(others)}")
    return torch.from_numpy(found).long()


def _build(config: SwitchingConfig, corpus: Corpus, folder: Path) -> None:
    tokenizer = train_tokenizer(corpus, config.vocabulary)
    maker = WindowMaker.build(corpus, tokenizer, config.window, config.prompt)
    size = config.pretraining_batch_size
    windows = maker.pretraining(config.pretraining_steps * size, config.switch, config.model_seed)
    model = build_model(
        tokenizer,
        hidden_size=config.hidden_size,
        layers=config.model_layers,
        heads=config.heads,
        positions=max(config.window, 128),
        seed=config.model_seed,
    )
    schedule = Schedule(config.pretraining_learning_rate, weight_decay=0.05, warmup_steps=60, floor=0.03)
    losses = pretrain(model, windows.input_ids.split(size), _part_loss, schedule, config)
    save_model(model, tokenizer, folder, losses)
    arrays: dict[str, Any] = {}
    for split, part in maker.encoded.items():
        for language, text in part.items():
            arrays[f"{split}/{language}/tokens"] = text.tokens
            arrays[f"{split}/{language}/boundaries"] = text.boundaries
    np.savez(folder / "encoded.npz", **arrays)


def _part_loss(model: PreTrainedModel, batch: Tensor, part: int) -> Tensor:
    """Cross-entropy of one half of a batch of windows, every token predicted."""
    rows = batch.to(model.device).chunk(SHARDS)[part]
    loss: Tensor = model(input_ids=rows, labels=rows, use_cache=False).loss / SHARDS
    return loss
