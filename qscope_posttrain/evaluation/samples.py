"""Group the responses of a model by prompt, and describe how they were drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.generation import Sample


def group_by_prompt(samples: Sequence[Sample]) -> dict[str, list[list[Sample]]]:
    """Samples of each prompt by language, in the order of the samples; those of one prompt by `sample_index`.

    Raises:
        ValueError: no samples, or unequal numbers of them per prompt.
    """
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


def rates_dict(entry: Any) -> dict[str, Any]:
    """JSON-ready fields of a dataclass with the intervals `wilson` and `bootstrap` of a rate."""
    return {**asdict(entry), "wilson": entry.wilson._asdict(), "bootstrap": entry.bootstrap._asdict()}
