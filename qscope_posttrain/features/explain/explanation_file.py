"""Explanations as a file of their own: JSONL, one feature a line, for more features than a FeatureSet should hold."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.explanation import Explanation, check_distinct
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.report.summary import write_text
from qscope_posttrain.text.jsonl import read_jsonl


def write_explanations(path: str | os.PathLike[str], explanations: Sequence[Explanation]) -> Path:
    """Write one JSON object a line, in one step. Returns the path."""
    write_text(path, "".join(json.dumps(entry.to_dict(), ensure_ascii=False) + "\n" for entry in explanations))
    return Path(path)


def read_explanations(path: str | os.PathLike[str]) -> tuple[Explanation, ...]:
    """Explanations from such a file, or from a FeatureSet (`*.safetensors`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no explanation, a feature explained twice, or none at all.
    """
    location = Path(path)
    if location.suffix == ".safetensors":
        found = FeatureSet.load(location).explanations
    else:
        found = tuple(_read(f"{location}, line {number}", row) for number, row in read_jsonl(location))
    if not found:
        raise UserValueError(f"'{location}' holds no explanations; `qscope features explain` writes them.")
    check_distinct(found)
    return found


def _read(place: str, row: Mapping[str, Any]) -> Explanation:
    try:
        return Explanation.from_dict(row)
    except ValueError as error:
        raise UserValueError(f"{place}: {error}") from error
