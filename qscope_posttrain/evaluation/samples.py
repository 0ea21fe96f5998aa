"""Group the responses of a model by prompt, count those that show a behavior, and describe how they were drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval, bootstrap_over_prompts, wilson
from qscope_posttrain.models.generation import Sample


@dataclass(frozen=True)
class GroupRate:
    """Responses to the prompts of one source language, or to all, and how many of them show a behavior."""

    prompts: int
    samples: int  # Number of responses, over all prompts
    ended: int  # Number of responses that ended by themselves
    wilson: Interval  # Share of responses that show it; takes all responses as independent
    bootstrap: Interval  # The same share; resamples prompts, because responses to one prompt are alike

    @staticmethod
    def fields_of(outcomes: NDArray[np.bool_], samples: Sequence[Sample]) -> dict[str, Any]:
        """These fields, of `outcomes` [prompts, samples per prompt] and the responses."""
        return {
            "prompts": len(outcomes),
            "samples": outcomes.size,
            "ended": sum(sample.ended for sample in samples),
            "wilson": wilson(int(outcomes.sum()), outcomes.size),
            "bootstrap": bootstrap_over_prompts(outcomes),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, intervals as {estimate, low, high}."""
        return {**asdict(self), "wilson": self.wilson._asdict(), "bootstrap": self.bootstrap._asdict()}


def group_by_prompt(samples: Sequence[Sample]) -> dict[str, list[list[Sample]]]:
    """Samples of each prompt by language, in the order of the samples; those of one prompt by `sample_index`.
    ValueError for no samples, or unequal numbers of them per prompt."""
    if not samples:
        raise UserValueError("No samples given.")
    order: dict[str, dict[int, list[Sample]]] = {}
    for sample in samples:
        order.setdefault(sample.language, {}).setdefault(sample.prompt_index, []).append(sample)
    counts = {len(group) for by_prompt in order.values() for group in by_prompt.values()}
    if len(counts) > 1:
        raise UserValueError(f"Every prompt needs the same number of samples; got {sorted(counts)}.")
    return {
        language: [sorted(group, key=lambda sample: sample.sample_index) for group in by_prompt.values()]
        for language, by_prompt in order.items()
    }


def note_of(settings: Mapping[str, Any], seed_noise: float, scope: str) -> str:
    """Settings and noise in words, to stand wherever the ratio does."""
    noise = f"two runs that differ only in their seed differ by up to {100 * seed_noise:.2g} points (95 %, {scope})"
    return "; ".join(filter(None, [", ".join(f"{name} {value}" for name, value in settings.items()), noise]))
