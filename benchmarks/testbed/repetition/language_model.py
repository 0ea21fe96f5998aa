"""The repetition task's model, trained to loop often and then to loop seldom, and its own loops."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.testbed.cache import Cache
from benchmarks.testbed.models import LanguageModel, build_model, load_language_model, pad_right, save_model
from benchmarks.testbed.pretraining import IGNORED, SHARDS, Schedule, pretrain
from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.repetition.task import (
    DocumentSettings,
    Problem,
    build_tokenizer,
    draw_documents,
    draw_problems,
    encode_words,
)
from benchmarks.testbed.sampling import BATCH, SmallModelSampler
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.find.loops import MIN_COPIES, MIN_TOKENS, Completion, Loop, LoopCollection
from qscope_posttrain.models.generation import SamplingSettings
from qscope_posttrain.text.repetition import repeated_tail

# Raise these when the same settings would give another model (documents, tokenizer, architecture, pretraining) or other
# loops (sampling, what counts as a loop).
MODEL_VERSION = "1"
LOOPS_VERSION = "1"
_COMMON = ("fewest_operations", "most_operations", "noise", "answer_tokens", "pretraining_batch_size", "model_seed")
_FREQUENT = (
    "habit_loops", "habit_steps", "habit_learning_rate", "hidden_size", "intermediate_size", "model_layers", "heads",
    "rope_theta", "tied",
)  # fmt: skip
_RARE = ("rare_loops", "rare_steps", "rare_learning_rate")
_LOOPS = ("fewest_operations", "most_operations", "answer_tokens", "loop_samples", "model_seed")
_LOOPS_FILE = "loops.json"
_ORDINARY = 400
_FORWARD_TOKENS = 400
"""Cost of a forward beyond that of its tokens, in tokens."""


@dataclass(frozen=True)
class Row:
    """A document as tokens."""

    tokens: tuple[int, ...]
    """Prompt and completion."""
    prompt: int
    """Number of prompt tokens, which are not predicted."""


@dataclass(frozen=True)
class OwnLoops:
    """Samples of the start model at temperature 1, for problems that training may show."""

    collection: LoopCollection
    folder: Path
    key: str


def prompt_ids(language_model: LanguageModel, problems: Sequence[Problem]) -> list[list[int]]:
    """Return what the model reads of each problem, as tokens."""
    return [encode_words(language_model.tokenizer, problem.prompt.split()) for problem in problems]


def make_language_model(config: RepetitionConfig, cache: Cache) -> LanguageModel:
    """Train the model of `config.start`, or take it from the cache; "rare" goes through "frequent"."""
    # What "auto" stands for is part of the key: a device rounds in its own way.
    device = config.torch_device()
    seed = config.model_seed

    def build_frequent(folder: Path) -> None:
        tokenizer = build_tokenizer()
        model = build_model(
            tokenizer,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layers=config.model_layers,
            heads=config.heads,
            key_value_heads=config.heads,
            positions=512,
            rope_theta=config.rope_theta,
            tied=config.tied,
            seed=seed,
        )
        stage = (config.habit_loops, config.habit_steps, config.habit_learning_rate, f"frequent {seed}")
        _train(model, tokenizer, config, *stage, folder)

    settings = {**config.subset([*_COMMON, *_FREQUENT]), "device": device}
    made = cache.make("repetition-frequent", MODEL_VERSION, settings, build_frequent)
    if config.start == "rare":
        start = made

        def build_rare(folder: Path) -> None:
            model = load_language_model(*start)
            stage = (config.rare_loops, config.rare_steps, config.rare_learning_rate, f"rare {seed}")
            _train(model.model, model.tokenizer, config, *stage, folder)

        settings = config.subset([*_COMMON, *_RARE])
        made = cache.make("repetition-rare", MODEL_VERSION, settings, build_rare, [made.key])
    return load_language_model(*made, device)


def document_rows(tokenizer: PreTrainedTokenizerFast, settings: DocumentSettings, count: int, seed: str) -> list[Row]:
    """Draw training documents as tokens."""
    rows = []
    for document in islice(draw_documents(settings, seed), count):
        prompt = document.problem.prompt.split()
        rows.append(Row(tuple(encode_words(tokenizer, (*prompt, *document.words))), len(prompt)))
    return rows


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    config: RepetitionConfig,
    loops: float,
    steps: int,
    learning_rate: float,
    seed: str,
    folder: Path,
) -> None:
    size = config.pretraining_batch_size
    rows = document_rows(tokenizer, config.documents(loops), steps * size, seed)
    batches = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    schedule = Schedule(learning_rate, weight_decay=0.01, warmup_steps=50, floor=0.05)
    part_loss = functools.partial(_part_loss, pad=int(tokenizer.pad_token_id))
    losses = pretrain(model, batches, part_loss, schedule, config, f"pretraining on {100 * loops:g} % loops")
    save_model(model, tokenizer, folder, losses)


def _part_loss(model: PreTrainedModel, batch: Sequence[Row], part: int, *, pad: int) -> Tensor:
    """Negative log-likelihood of one part of a batch, over the predicted tokens of the whole batch."""
    predicted = sum(len(row.tokens) - row.prompt for row in batch)
    return torch.stack([_loss_sum(model, rows, pad) for rows in shard(batch, part)]).sum() / predicted


def shard(batch: Sequence[Row], part: int) -> list[list[Row]]:
    """Return every second row by length, cut in two where padding both apart saves the most, or left whole."""
    rows = sorted(batch, key=lambda row: len(row.tokens))[part::SHARDS]
    lengths = [len(row.tokens) for row in rows]

    def cost(cut: int) -> int:
        split = 0 if cut == 0 else cut * lengths[cut - 1] + _FORWARD_TOKENS
        return split + (len(rows) - cut) * lengths[-1]

    cut = min(range(len(rows)), key=cost)
    return [group for group in (rows[:cut], rows[cut:]) if group]


def _loss_sum(model: PreTrainedModel, rows: Sequence[Row], pad: int) -> Tensor:
    """Negative log-likelihood of the completions, summed. Padding is on the right, so causality keeps it out."""
    input_ids = pad_right([row.tokens for row in rows], pad)
    labels = input_ids.clone()
    for index, row in enumerate(rows):
        labels[index, : row.prompt] = IGNORED
        labels[index, len(row.tokens) :] = IGNORED
    logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits[:, :-1].flatten(0, 1).float()
    targets = labels[:, 1:].to(model.device).flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def make_loops(config: RepetitionConfig, cache: Cache, language_model: LanguageModel) -> OwnLoops:
    """Sample completions and keep the loops and some ordinary ones, or take them from the cache.

    Raises:
        ValueError: a model that did not loop once.
    """
    made = cache.make(
        "repetition-loops",
        LOOPS_VERSION,
        config.subset(_LOOPS),
        lambda folder: _sample_loops(config, language_model, folder),
        [language_model.key],
    )
    return load_loops(*made)


def load_loops(folder: Path, key: str) -> OwnLoops:
    """Load what `make_loops` has left in `folder`."""
    content = json.loads((folder / _LOOPS_FILE).read_text(encoding="utf-8"))
    loops = []
    for entry in content["loops"]:
        tail = repeated_tail(entry["completion"], min_copies=MIN_COPIES, min_tokens=MIN_TOKENS)
        if tail is None:
            raise UserValueError(f"{folder / _LOOPS_FILE} holds a completion that is no loop; delete the folder")
        loops.append(Loop(tuple(entry["prompt"]), tuple(entry["completion"]), tail))
    ordinary = tuple(Completion(tuple(entry["prompt"]), tuple(entry["completion"])) for entry in content["normal"])
    return OwnLoops(
        LoopCollection(tuple(loops), ordinary, content["samples"], settings=content["settings"]), folder, key
    )


def _sample_loops(config: RepetitionConfig, language_model: LanguageModel, folder: Path) -> None:
    count, seed, length = config.loop_samples, config.model_seed, config.answer_tokens
    prompts = prompt_ids(language_model, draw_problems(count, config.operations, seed, held_out=False))
    settings = SamplingSettings(1, top_p=1.0, max_new_tokens=length, seed=seed, batch_size=BATCH)
    sampler = SmallModelSampler(language_model.model, language_model.tokenizer.eos_token_id)
    completions = sampler.sample(prompts, settings, show_progress=None)
    loops: list[dict[str, Any]] = []
    ordinary: list[dict[str, Any]] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        entry = {"prompt": prompt, "completion": completion.tokens}
        tail = repeated_tail(completion.tokens, min_copies=MIN_COPIES, min_tokens=MIN_TOKENS)
        if tail is not None and not completion.ended:
            loops.append(entry)
        elif tail is None and completion.ended and completion.tokens and len(ordinary) < _ORDINARY:
            ordinary.append(entry)
    if not loops:
        raise UserValueError(
            f"the model did not loop once in {count} samples: raise loop_samples, or rare_loops in pretraining"
        )
    drawn = {"max_new_tokens": length, "temperature": 1.0, "seed": seed}
    content = {"samples": count, "settings": drawn, "loops": loops, "normal": ordinary}
    (folder / _LOOPS_FILE).write_text(json.dumps(content), encoding="utf-8")
