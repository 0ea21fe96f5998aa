"""Study 6: do SAE features say which benchmarks are redundant (R-hat against R), and which measure the same thing
(overlap against how alike they rank models)?

A panel of models, two pretrained ones and versions of them, is scored on twenty benchmarks (panel/likelihoods.py), and
the features of the same items are read in one of the two (panel/features.py). Each of these steps runs once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.real.panel.agreement import Array
from benchmarks.real.panel.items import Item, benchmark_sets, own_option_sets
from benchmarks.real.panel.likelihoods import question_ids
from benchmarks.real.panel.tables import Panel, by_cell, read_panel, study
from benchmarks.real.pretrained import converted
from benchmarks.real.steps import run_step
from qscope_posttrain.models.loading import load_tokenizer
from qscope_posttrain.report.summary import write_text

PANEL = {
    "smollm2": ("base", "prune:0.6", "train:mathematics", "skip:12-14", "noise:0.15"),
    "gemma3": ("base", "prune:0.6"),
}
ITEMS, QUICK_ITEMS = {"base": 40, "altered": 28}, {"base": 8, "altered": 8}
"""Items of each benchmark at most: the pretrained models read more, for their accuracy; comparisons are on those that
every model reads"""
HERE = Path(__file__).parents[1] / "panel"


def run(options: argparse.Namespace) -> dict[str, Any]:
    counts, work = (QUICK_ITEMS if options.quick else ITEMS), options.work.parent
    panel = {options.model.name: PANEL[options.model.name][:3]} if options.quick else PANEL
    files = {}
    for name, variants in panel.items():
        folder = converted(name, options.model.parent.parent)
        for variant in variants:
            panel_step(folder, variant, work, counts["base" if variant == "base" else "altered"])
            files[f"{name} {variant}"] = json.loads(panel_file(folder, variant, work).read_text())
    features_step(options.model, options.saes, options.layers, work, counts["base"])
    with np.load(features_file(options.model, work)) as stored:
        read = {key: stored[key] for key in stored.files}
    tokenizer = load_tokenizer(str(options.model))
    sets, common = benchmark_sets(counts["base"]), min(counts.values())
    scored = read_panel(files, sets, own_option_sets(counts["base"]), common)
    cells = by_cell(sets, read, options.layers, common)
    sets = {name: found[:common] for name, found in sets.items()}
    tokens = {name: [list(question_ids(tokenizer, item)) for item in found] for name, found in sets.items()}
    result = study(scored, cells, tokens, options.layers)
    return {**result, "commands": commands(options, sets, scored, result)}


def commands(
    options: argparse.Namespace, sets: Mapping[str, Sequence[Item]], panel: Panel, result: Mapping[str, Any]
) -> dict[str, float]:
    """Run `qscope analyze` on the same items and scores, as a user would: the largest differences from the figures of
    the study, which reads three forms in one pass."""
    folder, names = options.work, result["similarity"]["benchmarks"]
    recipe = write_benchmarks({name: sets[name] for name in names}, panel.scores[result["score"]], folder)
    layer = options.layers[len(options.layers) // 2]
    given = ["--model", options.model, "--sae", options.saes, "--layers", layer, "--benchmarks", recipe]
    given += ["--correctness", folder / "scores"]
    found = {}
    for command in ("overlap", "redundancy"):
        words = list(map(str, ["qscope_posttrain", "analyze", command, *given, "--output", folder / command]))
        reads = [options.model, options.saes, folder / "items", folder / "scores"]
        run_step(f"{folder.name}_{command}", words, reads, options.work.parent)
        summary = json.loads((folder / command / "summary.json").read_text(encoding="utf-8"))
        found[command] = summary["results"][f"layer_{layer}"]
    matrix = result["similarity"][f"overlap, {result['main']}"]
    apart = [
        abs(pair["overlap_min"]["estimate"] - matrix[names.index(pair["first"]), names.index(pair["second"])])
        for pair in found["overlap"]["pairs"]
    ]
    r_hat = [
        abs(entry["r_hat"]["estimate"] - result["r_hat"][entry["name"]]) for entry in found["redundancy"]["redundancy"]
    ]
    return {"overlap_min, largest difference": max(apart), "R-hat, largest difference": max(r_hat)}


def write_benchmarks(sets: Mapping[str, Sequence[Item]], scores: Mapping[str, Array], folder: Path) -> Path:
    """The recipe of benchmarks, their items and the scores of every item, as `qscope analyze` reads them."""
    for name, found in sets.items():
        rows = [{"text": item.question, "unit": item.unit} for item in found]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "items").mkdir(parents=True, exist_ok=True)
        write_text(folder / "items" / f"{name}.jsonl", lines)
        (folder / "scores").mkdir(parents=True, exist_ok=True)
        columns = ",".join(f"model{number}" for number in range(scores[name].shape[1]))
        rows_of = (",".join(f"{score:.6f}" for score in row) for row in scores[name])
        write_text(folder / "scores" / f"{name}.csv", "\n".join([columns, *rows_of]) + "\n")
    entries = {
        name: {"source": str(folder / "items" / f"{name}.jsonl"), "field": "text", "unit": "unit"} for name in sets
    }
    write_text(folder / "benchmarks.yaml", yaml.safe_dump(entries, sort_keys=False))
    return folder / "benchmarks.yaml"


def panel_file(model: Path, variant: str, work: Path) -> Path:
    return work / f"panel_{model.name}_{variant.replace(':', '')}.json"


def panel_step(model: Path, variant: str, work: Path, items: int) -> dict[str, Any]:
    """Score one model of the panel, unless that was done before."""
    output = panel_file(model, variant, work)
    words: list[object] = ["benchmarks.real.panel.likelihoods", "--model", model, "--variant", variant]
    words += ["--items", items, "--output", output]
    return run_step(output.stem, list(map(str, words)), [model, HERE / "likelihoods.py", HERE / "items.py"], work)


def features_file(model: Path, work: Path) -> Path:
    return work / f"features_{model.name}.npz"


def features_step(model: Path, saes: Path, layers: Sequence[int], work: Path, items: int) -> dict[str, Any]:
    """Read the features of every item, unless that was done before."""
    output = features_file(model, work)
    words: list[object] = ["benchmarks.real.panel.features", "--model", model, "--saes", saes, "--layers", *layers]
    words += ["--items", items, "--output", output]
    read = [model, saes, *(HERE / f"{name}.py" for name in ("features", "items"))]
    return run_step(output.stem, list(map(str, words)), read, work)
