"""How often completions loop when the model is pushed along a direction for a while and then let go."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.find.loops import MIN_COPIES, MIN_TOKENS, Completion
from qscope_posttrain.intervals import Interval, wilson
from qscope_posttrain.models.batches import TokenBatch, TokenSequence, token_batches
from qscope_posttrain.models.generation import SamplingSettings, sample_batch
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.models.scoring import LOGITS_AT_A_TIME, model_logits
from qscope_posttrain.models.steering import Steering, Window, steer
from qscope_posttrain.report.progress import progress
from qscope_posttrain.text.repetition import repeated_tail

FEATURE, RANDOM, MEANS, UNSTEERED = "feature", "random", "difference of means", "unsteered"


@dataclass(frozen=True)
class CurveSettings:
    """What is tried, and how completions are drawn and judged."""

    strengths: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25)
    """Lengths of the push in units of the layer's median residual norm."""

    window_start: tuple[int, int] = (4, 12)
    """Generated token, counted from 0, with which the push begins: drawn for each completion from this range, both
    ends included."""

    window_lengths: tuple[int, ...] = ()
    """Generated tokens that are pushed, one or several to try; 0 stands for all up to the end. By default a quarter of
    `sampling.max_new_tokens`: after the window the model has to hold the loop by itself."""

    samples: int = 64
    """Completions behind each point of the scan."""

    fresh_samples: int = 256
    """Completions behind each number of the final check, drawn anew: the best of many looks better than it is."""

    random_directions: int = 8
    """Random directions that share the completions of a random point evenly."""

    single_rows: int = 3
    """The best so many rows of a layer are tried one by one, besides the sum of the best two and the sum of all."""

    sampling: SamplingSettings = field(default_factory=lambda: SamplingSettings(top_p=1.0, batch_size=128))
    """Temperature, length, rows at a time, seed; `samples_per_prompt` plays no part."""

    probability_floor: float = 1e-3
    """Tokens to which the unsteered model gives less are counted as unlikely."""

    max_unlikely_share: float = 1.0
    """Largest share of unlikely tokens with which a point may be chosen: lower it for negatives near the model's own
    text, at the price of fewer loops."""

    min_copies: int = MIN_COPIES
    min_tokens: int = MIN_TOKENS
    """What counts as a loop, see `text.repetition.is_endless_repetition`."""

    def __post_init__(self) -> None:
        for name in ("strengths", "window_start", "window_lengths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.window_lengths:
            object.__setattr__(self, "window_lengths", (max(1, self.sampling.max_new_tokens // 4),))
        if not self.strengths or any(not strength > 0 for strength in self.strengths):
            raise UserValueError(f"strengths must be positive, got {list(self.strengths)}.")
        if len(self.window_start) != 2 or not 0 <= self.window_start[0] <= self.window_start[1]:
            raise UserValueError(
                f"window_start must be [lowest, highest] with 0 <= lowest, got {list(self.window_start)}."
            )
        if self.window_start[1] >= self.sampling.max_new_tokens:
            raise UserValueError(
                f"window_start {list(self.window_start)} lies beyond the {self.sampling.max_new_tokens} tokens of a "
                "completion; lower it or raise max_new_tokens."
            )
        if any(length < 0 for length in self.window_lengths):
            raise UserValueError(f"window_lengths cannot be negative (0: to the end), got {list(self.window_lengths)}.")
        for name in ("samples", "fresh_samples", "random_directions", "single_rows"):
            if getattr(self, name) < 1:
                raise UserValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.probability_floor < 1:
            raise UserValueError(f"probability_floor must lie between 0 and 1, got {self.probability_floor}.")
        if not 0 <= self.max_unlikely_share <= 1:
            raise UserValueError(f"max_unlikely_share is a share in [0, 1], got {self.max_unlikely_share}.")


@dataclass(frozen=True, eq=False)
class Push:
    """A direction to try, or several that share the completions; or none at all."""

    kind: str
    """FEATURE, RANDOM, MEANS or UNSTEERED"""
    name: str
    layer: int | None = None
    vectors: Tensor | None = None
    """[directions, d_model], of unit length"""
    norm: float = 1.0
    """Median residual norm of the layer, the unit of strengths"""
    rows: tuple[int, ...] = ()
    """FEATURE: positions of its rows in the layer's features"""


@dataclass(frozen=True)
class Trial:
    """A push with its strength and window; counts are added by `measure`."""

    push: Push
    strength: float = 0.0
    window_length: int = 0


@dataclass(frozen=True)
class CurvePoint:
    """What the completions of one trial were like."""

    trial: Trial
    samples: int
    looped: int
    """Completions in endless repetition"""
    own: int
    """Those that repeat a block as long as those of the model's own loops"""
    tokens: int
    """Generated tokens of all completions, steered or not, without end tokens"""
    unlikely: int
    """Those to which the unsteered model gives less than `probability_floor`"""

    @property
    def rate(self) -> Interval:
        """Share of completions that loop like the model itself, with its 95 % Wilson interval."""
        return wilson(self.own, self.samples)

    @property
    def looped_share(self) -> float:
        """Share of completions that loop in whatever way."""
        return self.looped / self.samples

    @property
    def unlikely_share(self) -> float:
        """How far from the model's own text these completions are; 0 without any token."""
        return self.unlikely / self.tokens if self.tokens else 0.0

    @property
    def setting(self) -> tuple[int | None, float, int]:
        """Layer, strength and window length: what it shares with its controls."""
        return self.trial.push.layer, self.trial.strength, self.trial.window_length


@dataclass(frozen=True)
class _Row:
    """One completion to draw."""

    trial: int
    prompt: Sequence[int]
    start: int
    vector: Tensor | None


def measure(
    model: nn.Module,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    trials: Sequence[Trial],
    samples: int,
    settings: CurveSettings,
    *,
    periods: tuple[int, int] | None = None,
    seed: int = 0,
    description: str = "steering curve",
    show_progress: bool | None = None,
) -> list[CurvePoint]:
    """Draw `samples` completions for every trial and count those that loop.

    Completion j of every trial has prompt j (they are taken in turn), the same start of its window, and the j-th of
    the trial's directions in turn. The state of generated token t is pushed for start <= t < start + window_length:

        h' = h + strength * norm * vector

    A batch mixes trials, so that short scans fill it too. How likely the completions are under the unsteered model,
    at the sampling temperature, is found by a forward over each of them.

    Args:
        prompt_ids: encoded prompts, see `residual.sampling.encode_prompts`.
        periods: shortest and longest block of the model's own loops, see `LoopCollection.periods`; None for any.
        seed: of starts and sampling.

    Returns:
        A point for each trial, in their order.
    """
    starts = torch.randint(
        settings.window_start[0],
        settings.window_start[1] + 1,
        (samples,),
        generator=torch.Generator().manual_seed(seed),
    ).tolist()
    rows = [
        _Row(number, prompt_ids[j % len(prompt_ids)], starts[j], _vector(trial.push, j))
        for number, trial in enumerate(trials)
        for j in range(samples)
    ]
    looped, own, tokens, unlikely = Counter[int](), Counter[int](), Counter[int](), Counter[int]()
    shortest, longest = periods or (1, settings.sampling.max_new_tokens)
    draw = random.Random(seed)
    for batch in progress(
        list(_pieces(rows, settings.sampling.batch_size)), description=description, enabled=show_progress
    ):
        sampling = replace(settings.sampling, seed=draw.getrandbits(31))
        steerings = _steerings(trials, batch)
        prompts = [row.prompt for row in batch]
        with steer(model, *steerings, require_generated=False) if steerings else nullcontext():
            responses = sample_batch(model, tokenizer, prompts, sampling)
        completions = [
            Completion(tuple(row.prompt), tuple(ids)) for row, (ids, _) in zip(batch, responses, strict=True)
        ]
        rare = unlikely_tokens(model, completions, settings.probability_floor, sampling.temperature or 1.0)
        for row, (ids, ended), count in zip(batch, responses, rare, strict=True):
            # As `text.repetition.is_endless_repetition`, and the period besides.
            tail = repeated_tail(ids, min_copies=settings.min_copies, min_tokens=settings.min_tokens)
            looped[row.trial] += tail is not None and not ended
            own[row.trial] += tail is not None and not ended and shortest <= tail.period <= longest
            tokens[row.trial] += len(ids)
            unlikely[row.trial] += count
    return [
        CurvePoint(trial, samples, looped[number], own[number], tokens[number], unlikely[number])
        for number, trial in enumerate(trials)
    ]


@torch.no_grad()
def unlikely_tokens(
    model: nn.Module,
    completions: Sequence[Completion],
    floor: float,
    temperature: float = 1.0,
    tokens_per_batch: int = 8192,
) -> list[int]:
    """For each completion, how many of its tokens have a probability below `floor`, teacher forced."""
    sequences = [
        TokenSequence(0, number, entry.ids, False, max(1, len(entry.prompt_ids)))
        for number, entry in enumerate(completions)
        if entry.completion_ids
    ]
    counts = [0] * len(completions)
    with evaluation_mode(model):
        for batch in token_batches(sequences, tokens_per_batch):
            rare = _below(model, batch, floor, temperature)
            for sequence, count in zip(batch.sequences, rare, strict=True):
                counts[sequence.text] = count
    return counts


def _below(model: nn.Module, batch: TokenBatch, floor: float, temperature: float) -> list[int]:
    flat = model_logits(model, batch)
    counted = batch.positions()
    tokens = batch.input_ids.flatten()[counted].to(flat.device)
    predicting = (counted - 1).to(flat.device)
    owners = torch.div(counted, batch.input_ids.shape[1], rounding_mode="floor").to(flat.device)
    found = torch.zeros(len(batch.sequences), dtype=torch.int64, device=flat.device)
    size = max(1, LOGITS_AT_A_TIME // flat.shape[1])
    for at, token, owner in zip(predicting.split(size), tokens.split(size), owners.split(size), strict=True):
        logits = flat.index_select(0, at).float() / temperature
        probability = logits.log_softmax(dim=1).gather(1, token[:, None]).squeeze(1).exp()
        found.index_add_(0, owner, (probability < floor).long())
    return found.tolist()


def _vector(push: Push, number: int) -> Tensor | None:
    return None if push.vectors is None else push.vectors[number % len(push.vectors)]


def _pieces(rows: Sequence[_Row], size: int) -> Iterator[list[_Row]]:
    rest = iter(rows)
    while piece := list(islice(rest, size)):
        yield piece


def _steerings(trials: Sequence[Trial], batch: Sequence[_Row]) -> list[Steering]:
    """One steering for each layer and window length in the batch, for the rows that want it."""
    starts = torch.tensor([row.start for row in batch])
    wishes = [(trials[row.trial].push.layer, trials[row.trial].window_length) for row in batch]
    steerings = []
    for layer, length in dict.fromkeys(wishes):
        mine = [wish == (layer, length) for wish in wishes]
        if layer is None:
            continue
        pushes = [_shift(trials[row.trial], row) if own else None for row, own in zip(batch, mine, strict=True)]
        width = next(push for push in pushes if push is not None)
        directions = torch.stack([torch.zeros_like(width) if push is None else push for push in pushes])
        window = Window(starts, length or None)
        steerings.append(Steering(directions, (layer,), positions=window, rows=torch.tensor(mine)))
    return steerings


def _shift(trial: Trial, row: _Row) -> Tensor | None:
    return None if row.vector is None else trial.strength * trial.push.norm * row.vector.float()
