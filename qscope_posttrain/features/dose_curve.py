"""Dose curves: sample under steering along directions at several strengths, next to controls of equal length.

`find.repetition_curve` chooses a steering by the loops that it causes, `evaluation.dose_curve` reports any effect and
its cost: both draw with `sample_trials`, and compare features with `controls` (as `causal` does).
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
from qscope_posttrain.models.generation import Response, SamplingSettings, sample_batch
from qscope_posttrain.models.scoring import completion_sequences, sequence_losses
from qscope_posttrain.models.steering import Mode, Positions, Steering, Window, steer
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
    """A direction to steer along, or several that share the completions, or none at all; how strongly and where."""

    kind: str  # FEATURE, RANDOM, MEANS or UNSTEERED
    name: str
    layer: int | None = None
    vectors: Tensor | None = None  # [directions, d_model], of unit length
    norm: float = 1.0  # Unit of strengths of mode "add": the layer's median residual norm, or 1
    rows: tuple[int, ...] = ()  # FEATURE: positions of its rows in the layer's features
    strength: float = 0.0
    window_length: int = 0  # Number of generated tokens to steer; 0: to the end
    mode: Mode = "add"  # Or "project_out"
    positions: Positions | None = None  # Tokens to steer instead of a window

    @property
    def setting(self) -> tuple[int | None, float, int]:
        """Layer, strength and window length: what it shares with its controls."""
        return self.layer, self.strength, self.window_length

    @property
    def steered_alike(self) -> tuple[Any, ...]:
        """Equal for trials that one `Steering` of a batch can serve."""
        strength = self.strength if self.mode == "project_out" else None  # "add" has it in the vectors
        return self.layer, self.window_length, self.mode, self.positions, strength

    def vector(self, sample: int) -> Tensor:
        """[d_model] for completion number `sample`, the directions taking turns: of mode "add" what is added."""
        if self.vectors is None:
            raise UserValueError(f"The trial {self.name!r} has no direction.")
        length = 1.0 if self.mode == "project_out" else self.strength * self.norm
        return length * self.vectors[sample % len(self.vectors)].float()


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


def sample_trials(
    model: nn.Module,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    trials: Sequence[Trial],
    samples: int,
    sampling: SamplingSettings,
    *,
    starts: Tensor | None = None,
    seed: int = 0,
    description: str = "dose curve",
    show_progress: bool | None = None,
) -> list[list[Response]]:
    """Draw `samples` completions for every trial: [trials][samples].

    Completion j of every trial has prompt j and the j-th of the trial's directions (both are taken in turn), and a
    window begins at its `starts[j]`. A batch mixes trials, so that short scans fill it too. Of `sampling`,
    `samples_per_prompt` and `seed` are not used; `seed` gives every batch its own.
    """
    jobs = [(number, j) for number in range(len(trials)) for j in range(samples)]
    batches = [jobs[first : first + sampling.batch_size] for first in range(0, len(jobs), sampling.batch_size)]
    found: list[list[Response]] = [[] for _ in trials]
    draw = random.Random(seed)
    for batch in progress(batches, description=description, enabled=show_progress):
        drawn = replace(sampling, seed=draw.getrandbits(31))
        steerings = _steerings([(trials[number], j) for number, j in batch], starts)
        prompts = [prompt_ids[j % len(prompt_ids)] for _, j in batch]
        with steer(model, *steerings, require_generated=False) if steerings else nullcontext():
            for (number, _), response in zip(batch, sample_batch(model, tokenizer, prompts, drawn), strict=True):
                found[number].append(response)
    return found


def measure_loops(
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
    """Count the completions of every trial that loop, and their tokens that are unlikely without steering, at the
    sampling temperature.

    `periods` are the shortest and the longest block of the model's own loops (see `LoopCollection.periods`), None for
    any; `seed` is of the starts of windows and of sampling.
    """
    low, high = settings.window_start
    starts = torch.randint(low, high + 1, (samples,), generator=torch.Generator().manual_seed(seed))
    shown: dict[str, Any] = {"description": description, "show_progress": show_progress}
    drawn = sample_trials(
        model, tokenizer, prompt_ids, trials, samples, settings.sampling, starts=starts, seed=seed, **shown
    )
    prompts = [prompt_ids[j % len(prompt_ids)] for j in range(samples)]
    shortest, longest = periods or (1, settings.sampling.max_new_tokens)
    points = []
    for trial, responses in zip(trials, drawn, strict=True):
        # As `text.repetition.is_endless_repetition`, and the period besides.
        tails = [
            repeated_tail(ids, min_copies=settings.min_copies, min_tokens=settings.min_tokens)
            for ids, ended in responses
            if not ended
        ]
        looped = [tail.period for tail in tails if tail is not None]
        own = sum(shortest <= period <= longest for period in looped)
        tokens = [ids for ids, _ in responses]
        rare = unlikely_tokens(model, prompts, tokens, settings.probability_floor, settings.sampling.temperature or 1.0)
        points.append(CurvePoint(trial, samples, len(looped), own, sum(map(len, tokens)), sum(rare)))
    return points


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


def _steerings(batch: Sequence[tuple[Trial, int]], starts: Tensor | None) -> list[Steering]:
    """Steer the rows of a batch, each with its own vector: one steering for all rows that are steered alike."""
    alike = [trial.steered_alike for trial, _ in batch]
    own_starts = 0 if starts is None else starts[[j for _, j in batch]]
    steerings = []
    for trial in {trial.steered_alike: trial for trial, _ in batch}.values():
        if trial.layer is None:
            continue
        mine = [key == trial.steered_alike for key in alike]
        # Rows that are not `mine` hold any vector: the mask leaves them out.
        vectors = [(other if own else trial).vector(j) for (other, j), own in zip(batch, mine, strict=True)]
        positions = trial.positions or Window(own_starts, trial.window_length or None)
        strength = trial.strength if trial.mode == "project_out" else 1.0
        directions, rows = torch.stack(vectors), torch.tensor(mine)
        steerings.append(Steering(directions, (trial.layer,), strength, trial.mode, positions=positions, rows=rows))
    return steerings
