"""Samples by source language and prompt, as outcomes `[prompts, samples]` need them."""

from __future__ import annotations

from collections.abc import Sequence

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.residual.sampling import Sample


def group_by_prompt(samples: Sequence[Sample]) -> dict[str, list[list[Sample]]]:
    """Per language, in the order in which they come, the samples of each prompt in the order of `sample_index`.

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


def same_prompts(first: Sequence[Sample], second: Sequence[Sample]) -> bool:
    """Whether both were drawn from the same prompts in the same order."""
    return _prompts(first) == _prompts(second)


def _prompts(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    return [(sample.language, sample.prompt) for sample in samples if sample.sample_index == 0]
