"""Study 6: do SAE features say which benchmarks are redundant (R-hat against R), and which measure the same thing
(overlap against how alike they rank models)?

A panel of models, two pretrained ones and versions of them, is scored on twenty benchmarks (panel/likelihoods.py), and
the features of the same items are read in one of the two (panel/features.py). Each of these steps runs once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real.panel.items import benchmark_sets, own_option_sets
from benchmarks.real.panel.likelihoods import question_ids
from benchmarks.real.panel.tables import read_panel, study
from benchmarks.real.pretrained import converted
from benchmarks.real.steps import run_step
from qscope_posttrain.models.loading import load_tokenizer

PANEL = {
    "smollm2": ("base", "prune:0.4", "prune:0.6", "noise:0.2", "skip:12-14", "train:mathematics"),
    "gemma3": ("base", "prune:0.4", "prune:0.6", "noise:0.2", "skip:8-9", "train:mathematics"),
}
HERE = Path(__file__).parent / "panel"


def run(options: argparse.Namespace) -> dict[str, Any]:
    count, work = (8 if options.quick else 40), options.work.parent
    sets = benchmark_sets(count)
    panel = {options.model.name: PANEL[options.model.name][:3]} if options.quick else PANEL
    files = {}
    for name, variants in panel.items():
        folder = converted(name, options.model.parent.parent)
        for variant in variants:
            panel_step(folder, variant, work, count)
            files[f"{name} {variant}"] = json.loads(panel_file(folder, variant, work).read_text())
    features_step(options.model, options.saes, options.layers, work, count)
    with np.load(features_file(options.model, work)) as stored:
        read = {key: stored[key] for key in stored.files}
    tokenizer = load_tokenizer(str(options.model))
    tokens = {name: [list(question_ids(tokenizer, item)) for item in found] for name, found in sets.items()}
    return study(read_panel(files, sets, own_option_sets(count)), sets, read, tokens, options.layers)


def panel_file(model: Path, variant: str, work: Path) -> Path:
    return work / f"panel_{model.name}_{variant.replace(':', '')}.json"


def panel_step(model: Path, variant: str, work: Path, items: int = 40) -> dict[str, Any]:
    """Score one model of the panel, unless that was done before."""
    output = panel_file(model, variant, work)
    words: list[object] = ["benchmarks.real.panel.likelihoods", "--model", model, "--variant", variant]
    words += ["--items", items, "--output", output]
    return run_step(output.stem, list(map(str, words)), [model, HERE / "likelihoods.py", HERE / "items.py"], work)


def features_file(model: Path, work: Path) -> Path:
    return work / f"features_{model.name}.npz"


def features_step(model: Path, saes: Path, layers: Sequence[int], work: Path, items: int = 40) -> dict[str, Any]:
    """Read the features of every item, unless that was done before."""
    output = features_file(model, work)
    words: list[object] = ["benchmarks.real.panel.features", "--model", model, "--saes", saes, "--layers", *layers]
    words += ["--items", items, "--output", output]
    read = [model, saes, *(HERE / f"{name}.py" for name in ("features", "items"))]
    return run_step(output.stem, list(map(str, words)), read, work)
