"""Group the responses of a model by prompt, describe how they were drawn, and write them to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.generation import Sample
from qscope_posttrain.report.summary import write_text


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


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write every row as one line of JSON, in one step, and return the path. ValueError if it cannot be written."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return Path(path)
