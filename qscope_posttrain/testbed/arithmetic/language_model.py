"""The arithmetic model in two stages, each made once: one that loops often, and from it one that seldom does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3ForCausalLM

from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.documents import DocumentSettings, draw_documents
from qscope_posttrain.testbed.arithmetic.model import build_model
from qscope_posttrain.testbed.arithmetic.pretrain import Row, pretrain
from qscope_posttrain.testbed.arithmetic.task import Problem
from qscope_posttrain.testbed.arithmetic.tokenizer import build_tokenizer, encode_words
from qscope_posttrain.testbed.cache import Cache
from qscope_posttrain.testbed.cores import worker_count
from qscope_posttrain.testbed.language_model import no_progress_bars, save_model
from qscope_posttrain.testbed.shared_training import SHARDS

_SOURCES = (
    "testbed/shared_training.py",
    *(
        f"testbed/arithmetic/{name}.py"
        for name in ("task", "documents", "tokenizer", "model", "pretrain", "language_model")
    ),
)
_COMMON = (
    "fewest_operations", "most_operations", "noise", "answer_tokens", "pretraining_batch_size", "model_seed",
)  # fmt: skip
_FREQUENT = (
    "habit_loops", "habit_steps", "habit_learning_rate", "hidden_size", "intermediate_size", "model_layers", "heads",
    "rope_theta", "tied",
)  # fmt: skip
_RARE = ("rare_loops", "rare_steps", "rare_learning_rate")


@dataclass(frozen=True)
class ArithmeticModel:
    """A pretrained model and what it reads."""

    model: PreTrainedModel
    """In eval mode."""
    tokenizer: PreTrainedTokenizerFast
    losses: tuple[float, ...]
    """Loss of every step of its last stage."""
    folder: Path
    """Where it lies, in the format of transformers."""
    key: str
    """Its key in the cache."""

    def prompts(self, problems: Sequence[Problem]) -> list[list[int]]:
        """What the model reads of each problem, as tokens."""
        return [encode_words(self.tokenizer, problem.prompt.split()) for problem in problems]


def make_language_model(config: ArithmeticConfig, cache: Cache) -> ArithmeticModel:
    """The model of `config.start`, from the cache or trained: "rare" goes through "frequent"."""
    # What "auto" stands for is part of the key: a device rounds in its own way.
    device = config.torch_device()
    key = cache.key({**config.subset(*_COMMON, *_FREQUENT), "device": device}, _SOURCES)
    folder = cache.folder("arithmetic-frequent", key, lambda place: _train_frequent(config, place))
    if config.start == "rare":
        frequent = folder
        key = cache.key(config.subset(*_COMMON, *_RARE), _SOURCES, [key])
        folder = cache.folder("arithmetic-rare", key, lambda place: _train_rare(config, frequent, place))
    return load_language_model(folder, key, device)


def load_language_model(folder: Path, key: str, device: str = "cpu") -> ArithmeticModel:
    """Read what `make_language_model` has left in `folder`, onto a device."""
    losses = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = load_trained_model(folder, device)
    return ArithmeticModel(model, tokenizer, tuple(losses), folder, key)


def load_trained_model(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """A model of the testbed in the format of transformers, in eval mode."""
    with no_progress_bars():
        model: PreTrainedModel = Qwen3ForCausalLM.from_pretrained(folder, device_map=device).eval()
    return model


def document_rows(tokenizer: PreTrainedTokenizerFast, settings: DocumentSettings, count: int, seed: str) -> list[Row]:
    """Training documents as tokens."""
    rows = []
    for document in islice(draw_documents(settings, seed), count):
        prompt = document.problem.prompt.split()
        rows.append(Row(tuple(encode_words(tokenizer, (*prompt, *document.words))), len(prompt)))
    return rows


def _train_frequent(config: ArithmeticConfig, folder: Path) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, config)
    seed = f"frequent {config.model_seed}"
    _train(model, tokenizer, config, config.habit_loops, config.habit_steps, config.habit_learning_rate, seed, folder)


def _train_rare(config: ArithmeticConfig, frequent: Path, folder: Path) -> None:
    start = load_language_model(frequent, "")
    model, tokenizer, seed = start.model, start.tokenizer, f"rare {config.model_seed}"
    _train(model, tokenizer, config, config.rare_loops, config.rare_steps, config.rare_learning_rate, seed, folder)


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    config: ArithmeticConfig,
    loops: float,
    steps: int,
    learning_rate: float,
    seed: str,
    folder: Path,
) -> None:
    size = config.pretraining_batch_size
    rows = document_rows(tokenizer, config.documents(loops), steps * size, seed)
    batches = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    description = f"pretraining on {100 * loops:g} % loops"
    device = config.torch_device()
    nn.Module.to(model, device)  # transformers' own `to` is wrapped in a way that hides its type
    processes = worker_count(config.workers, SHARDS) if device == "cpu" else 1
    losses = pretrain(model, batches, learning_rate, int(tokenizer.pad_token_id), processes, description)
    save_model(model, tokenizer, folder)
    (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
