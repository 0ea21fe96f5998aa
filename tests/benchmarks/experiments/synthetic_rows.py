"""Rows of switching experiments with numbers that one can compute by hand."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.experiments.arms import SWITCHING_ARMS as ARMS

SFT_HZ, SFT_CSX, SFT_PPL, SFT_ENTRY = 0.01, 0.3, 20.0, -4.0


def metrics(
    cost: float, hazard: float, expected: float | None = None, languages: dict[str, float] | None = None
) -> dict[str, Any]:
    """Metrics `cost` per cent dearer than SFT, with hazard and expected ratio `hazard` and `expected` times SFT's."""
    return {
        "hz": SFT_HZ * hazard,
        "csx": SFT_CSX * (hazard if expected is None else expected),
        "ppl": 1.1 * SFT_PPL * (1 + cost / 100),
        "masked_ppl": SFT_PPL * (1 + cost / 100),
        "target_ppl": 40.0 * (1 + 2 * cost / 100),
        "entry": SFT_ENTRY + math.log(hazard),
        "hz_by_language": languages or {"en": SFT_HZ * hazard, "ru": SFT_HZ * hazard},
    }


def switching_row(
    arm: str = "sft",
    weight: float = 0.0,
    cost: float = 0.0,
    hazard: float = 1.0,
    *,
    expected: float | None = None,
    val: tuple[float, float] | None = None,
    target: int | None = 100,
    any_script: int | None = None,
    cell: str = "zh",
    base: int = 0,
    seed: int = 101,
    **others: Any,
) -> dict[str, Any]:
    """A row whose test metrics are SFT's times the given factors; `val` is (cost, hazard) on validation prompts."""
    sampled = None
    if target is not None:
        count = target if any_script is None else any_script
        languages = {"en": {"prompts": 400, "target": target, "any": count}}
        sampled = {"prompts": 400, "target": target, "any": count, "endless": 0, "languages": languages}
    return {
        "kind": "switching",
        "cell": cell,
        "target": "zh",
        "identify": "script",
        "base": base,
        "arm": arm,
        "title": ARMS[arm].title if arm in ARMS else arm,
        "sae": arm in ARMS and ARMS[arm].uses_sae,
        "weight": weight,
        "seed": seed,
        "metrics": {"val": metrics(*(val or (cost, hazard))), "test": metrics(cost, hazard, expected)},
        "sampled": sampled,
        "seconds": 9.0,
        "step_seconds": 0.2,
        "folder": "/nowhere/run",
        **others,
    }
