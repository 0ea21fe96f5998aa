"""Dose curves: steer a model along directions at several strengths, and measure what its completions are like.

`find.repetition_curve`, which chooses a steering for loops, `evaluation.dose_curve`, which reports an effect and its
cost, and `causal` compare the directions of features with the same `controls`: random ones and a difference of means.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import difference_of_means, random_directions
from qscope_posttrain.intervals import Interval, wilson
from qscope_posttrain.models.generation import SamplingSettings, sample_batch
from qscope_posttrain.models.scoring import completion_sequences, sequence_losses
from qscope_posttrain.models.steering import Steering, Window, steer
from qscope_posttrain.report.progress import progress
from qscope_posttrain.text.repetition import repeated_tail

FEATURE, RANDOM, MEANS, UNSTEERED = "features", "random", "difference of means", "unsteered"
MIN_COPIES, MIN_TOKENS = 4, 12


@dataclass(frozen=True)
class CurveSettings:
    """Strengths and windows to try, and how completions are drawn and judged."""

    strengths: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25)  # Lengths of the push, in median residual norms
    window_start: tuple[int, int] = (4, 12)
    """Generated token, from 0, with which the push begins: drawn for each completion from this range, ends included."""
    window_lengths: tuple[int, ...] = ()
    """Numbers of generated tokens to push, one or several to try; 0 stands for all up to the end. By default a quarter
    of `sampling.max_new_tokens`: after the window the model has to hold the loop by itself."""
    samples: int = 64  # Completions behind each point of the scan
    fresh_samples: int = 256  # Completions of the final check, drawn anew: the best of many looks better than it is
    random_directions: int = 8  # Random directions that share the completions of a random point evenly
    single_rows: int = 3  # Rows of a layer that are tried one by one, besides the sum of the best two and of all
    sampling: SamplingSettings = field(default_factory=lambda: SamplingSettings(top_p=1.0, batch_size=128))
    """Temperature, length, rows at a time, seed; `samples_per_prompt` is not used."""
    probability_floor: float = 1e-3  # Tokens to which the unsteered model gives less are counted as unlikely
    max_unlikely_share: float = 1.0
    """Largest share of unlikely tokens of a chosen point: lower it for negatives near the model's own text, at the cost
    of fewer loops."""
    min_copies: int = MIN_COPIES
    min_tokens: int = MIN_TOKENS  # Minimum size of a loop, see `text.repetition.is_endless_repetition`

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
class Trial:
    """A direction to push along, or several that share the completions, or none at all; with strength and window."""

    kind: str  # FEATURE, RANDOM, MEANS or UNSTEERED
    name: str
    layer: int | None = None
    vectors: Tensor | None = None  # [directions, d_model], of unit length
    norm: float = 1.0  # Median residual norm of the layer, the unit of strengths
    rows: tuple[int, ...] = ()  # FEATURE: positions of its rows in the layer's features
    strength: float = 0.0
    window_length: int = 0

    @property
    def setting(self) -> tuple[int | None, float, int]:
        """Layer, strength and window length: what it shares with its controls."""
        return self.layer, self.strength, self.window_length

    def shift(self, sample: int) -> Tensor | None:
        """[d_model] added to the states of completion number `sample`: the directions take turns."""
        if self.vectors is None:
            return None
        return self.strength * self.norm * self.vectors[sample % len(self.vectors)].float()


@dataclass(frozen=True)
class CurvePoint:
    """Counts over the completions of one trial."""

    trial: Trial
    samples: int
    looped: int  # Completions in endless repetition
    own: int  # Those that repeat a block as long as those of the model's own loops
    tokens: int  # Generated tokens of all completions, steered or not, without end tokens
    unlikely: int  # Those to which the unsteered model gives less than `probability_floor`

    @property
    def rate(self) -> Interval:
        """Share of completions that loop like the model itself, with its 95 % Wilson interval."""
        return wilson(self.own, self.samples)

    @property
    def looped_share(self) -> float:
        """Share of completions in endless repetition of any kind."""
        return self.looped / self.samples

    @property
    def unlikely_share(self) -> float:
        """Share of unlikely tokens: the distance from the model's own text; 0 without any token."""
        return self.unlikely / self.tokens if self.tokens else 0.0


def controls(means: Tensor, target: int, count: int, seed: int) -> dict[str, Tensor]:
    """Directions [n, d_model] to compare features with: `count` random ones of unit length, and, of several `means`
    [L, d_model], that of `target` minus the mean of the others, at its own length."""
    found = {RANDOM: random_directions(torch.ones(count), means.shape[1], seed)}
    if len(means) > 1:
        found[MEANS] = difference_of_means(means, target)[None]
    return found


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
    """Draw `samples` completions for every trial, count those that loop, and return a point for each trial.

    Completion j of every trial has prompt j (they are taken in turn), the same start of its window, and the j-th of
    the trial's directions in turn. The state of generated token t is pushed for start <= t < start + window_length:

        h' = h + strength * norm * vector

    A batch mixes trials, so that short scans fill it too. How likely the completions are under the unsteered model,
    at the sampling temperature, is found by a forward over each of them. `periods` are the shortest and the longest
    block of the model's own loops (see `LoopCollection.periods`), None for any; `seed` is of starts and sampling.
    """
    low, high = settings.window_start
    starts = torch.randint(low, high + 1, (samples,), generator=torch.Generator().manual_seed(seed))
    jobs = [(number, j) for number in range(len(trials)) for j in range(samples)]
    size = settings.sampling.batch_size
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    shortest, longest = periods or (1, settings.sampling.max_new_tokens)
    counts = torch.zeros(len(trials), 4, dtype=torch.int64)
    draw = random.Random(seed)
    for batch in progress(batches, description=description, enabled=show_progress):
        sampling = replace(settings.sampling, seed=draw.getrandbits(31))
        steerings = _steerings([(trials[number], j) for number, j in batch], starts)
        prompts = [prompt_ids[j % len(prompt_ids)] for _, j in batch]
        with steer(model, *steerings, require_generated=False) if steerings else nullcontext():
            responses = sample_batch(model, tokenizer, prompts, sampling)
        floor, temperature = settings.probability_floor, sampling.temperature or 1.0
        rare = unlikely_tokens(model, prompts, [ids for ids, _ in responses], floor, temperature)
        for (number, _), (ids, ended), unlikely in zip(batch, responses, rare, strict=True):
            # As `text.repetition.is_endless_repetition`, and the period besides.
            tail = None if ended else repeated_tail(ids, min_copies=settings.min_copies, min_tokens=settings.min_tokens)
            own = tail is not None and shortest <= tail.period <= longest
            counts[number] += torch.tensor([tail is not None, own, len(ids), unlikely])
    return [CurvePoint(trial, samples, *found) for trial, found in zip(trials, counts.tolist(), strict=True)]


def unlikely_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    floor: float,
    temperature: float = 1.0,
    tokens_per_batch: int = 8192,
) -> list[int]:
    """For each response, how many of its tokens have a probability below `floor`, teacher forced."""
    counts = torch.zeros(len(responses), dtype=torch.int64)
    sequences = completion_sequences(prompts, responses)
    for texts, losses in sequence_losses(model, sequences, temperature=temperature, tokens_per_batch=tokens_per_batch):
        counts += texts[(-losses).exp() < floor].bincount(minlength=len(counts))
    return counts.tolist()


def _steerings(batch: Sequence[tuple[Trial, int]], starts: Tensor) -> list[Steering]:
    """One steering for each layer and window length in the batch, for its rows."""
    own_starts = starts[[j for _, j in batch]]
    wishes = [(trial.layer, trial.window_length) for trial, _ in batch]
    steerings = []
    for layer, length in dict.fromkeys(wishes):
        if layer is None:
            continue
        mine = [wish == (layer, length) for wish in wishes]
        shifts = [trial.shift(j) if own else None for (trial, j), own in zip(batch, mine, strict=True)]
        nothing = torch.zeros_like(next(shift for shift in shifts if shift is not None))
        directions = torch.stack([nothing if shift is None else shift for shift in shifts])
        window = Window(own_starts, length or None)
        steerings.append(Steering(directions, (layer,), positions=window, rows=torch.tensor(mine)))
    return steerings
