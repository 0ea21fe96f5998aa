"""Study 6."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real.steps import run_step

HERE = Path(__file__).parent
PANEL = {
    "smollm2": ("base", "prune:0.4", "prune:0.6", "noise:0.2", "skip:12-14", "train:mathematics"),
    "gemma3": ("base", "prune:0.4", "prune:0.6", "noise:0.2", "skip:8-9", "train:mathematics"),
}


def panel_step(model: Path, variant: str, work: Path, items: int = 40) -> dict[str, Any]:
    """Score one model of the panel, unless that was done before."""
    name = f"panel_{model.name}_{variant.replace(':', '')}"
    output = work / f"{name}.json"
    words: list[object] = ["benchmarks.real.panel", "--model", model, "--variant", variant, "--output", output]
    words += ["--items", items]
    return run_step(name, list(map(str, words)), [model, HERE / "panel.py", HERE / "matching.py"], work)


def features_step(model: Path, saes: Path, layers: Sequence[int], work: Path, items: int = 40) -> dict[str, Any]:
    """Read the features of every item, unless that was done before."""
    output = work / f"features_{model.name}.npz"
    words: list[object] = ["benchmarks.real.item_features", "--model", model, "--saes", saes, "--layers", *layers]
    words += ["--items", items, "--output", output]
    read = [model, saes, *(HERE / f"{name}.py" for name in ("item_features", "matching"))]
    return run_step(f"features_{model.name}", list(map(str, words)), read, work)
