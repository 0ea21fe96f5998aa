"""Write the data as TRL reads it, with the provenance of every row."""

from __future__ import annotations

import os
import random
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserValueError, library_refusals
from qscope_posttrain.features.explain.explanation import FeatureId
from qscope_posttrain.synthesis.pipeline import SynthesisExample

if TYPE_CHECKING:
    from datasets import Dataset

TYPES = tuple(f"{prompt_type} {kind}" for prompt_type in ("vanilla", "adversarial") for kind in ("harmful", "benign"))


def example_row(example: SynthesisExample, relevance: Mapping[FeatureId, float]) -> dict[str, Any]:
    """One row: `prompt` and `completion` in TRL's conversational form, and its provenance."""
    draft, response = example.draft, example.response
    if draft.explanation is None:
        raise UserValueError("only prompts that were written for a feature become rows.")
    feature = draft.explanation.feature
    return {
        "prompt": [{"role": "user", "content": draft.text}],
        "completion": [{"role": "assistant", "content": response.text}],
        "layer": feature.layer,
        "feature": feature.feature_id,
        "explanation": draft.explanation.text,
        "relevance": float(relevance[feature]),
        "activation": example.activation,
        "prompt_type": draft.prompt_type,
        "style": draft.style,
        "asked_kind": draft.kind,
        "kind": response.kind,
        "prompt_request": draft.request_id,
        "response_request": response.request_id,
    }


def row_type(row: Mapping[str, Any]) -> str:
    """One of the four types, such as "vanilla harmful"."""
    return f"{row['prompt_type']} {row['kind']}"


def type_counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Number of rows of each of the four types."""
    found = dict.fromkeys(TYPES, 0)
    for row in rows:
        found[row_type(row)] += 1
    return found


def balanced(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> list[Mapping[str, Any]]:
    """Draw the same number of rows of each type that occurs, that of the rarest; they stay in order."""
    least = min((count for count in type_counts(rows).values() if count), default=0)
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row_type(row), []).append(place)
    draw = random.Random(seed)
    kept = sorted(place for name in sorted(places) for place in draw.sample(places[name], least))
    return [rows[place] for place in kept]


def save_rows(rows: Sequence[Mapping[str, Any]], folder: str | os.PathLike[str]) -> Dataset:
    """Write a data set for `load_from_disk` and for `dataset_name` of a recipe; it replaces an older one."""
    from datasets import Dataset

    if not rows:
        raise UserValueError("there are no rows to save: no prompt was kept and answered.")
    target = Path(folder)
    made = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    found = Dataset.from_list([dict(row) for row in rows])
    try:
        with library_refusals(f"cannot write '{target}'", OSError):
            found.save_to_disk(str(made))
        if target.exists():
            if not (target / "state.json").is_file():
                raise UserValueError(f"'{target}' is no data set and is in the way; move it, or choose another output.")
            shutil.rmtree(target)
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return found
