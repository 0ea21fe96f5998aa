"""Cells of tables, and tables of docs/ that are made from all results on real models together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from qscope_posttrain.report.tables import Table


def shown(interval: Iterable[float], form: str = ".1f", unit: float = 1.0) -> str:
    """An estimate with its limits, times `unit`: `1.2 (0.3 .. 2.0)`."""
    estimate, low, high = (unit * limit for limit in interval)
    return f"{estimate:{form}} ({low:{form}} .. {high:{form}})"


def with_unit(cell: str, unit: str) -> str:
    """`+1.2 (+0.3 .. +2.0)` with the unit behind the estimate."""
    return cell.replace(" (", f" {unit} (", 1)


def said_once(rows: Sequence[list[str]]) -> None:
    """Empty each first cell that says the same as the one above."""
    for previous, row in reversed(list(pairwise(rows))):
        if previous[0] == row[0]:
            row[0] = ""


def saes(folder: Path) -> str:
    """What `qscope sae check` says of the SAEs of both models."""
    rows: list[list[str | int]] = []
    for path in sorted(folder.glob("*_saes_check.json"), reverse=True):
        for sae in json.loads(path.read_text(encoding="utf-8"))["layers"]:
            measured = (sae["fvu"], sae["recovered"]["mean"], sae["recovered"]["zero"])
            fvu, *recovered = (shown(found.values(), ".3f") for found in measured)
            model, chance = path.stem.partition("_")[0], f"{sae['fit']['chance']:.2f}"
            rows.append([model, sae["layer"], fvu, chance, *recovered, sae["tokens"]])
    columns = ["model", "layer", "FVU", "by chance", "recovered of mean ablation", "of zero ablation", "tokens"]
    caption = "`qscope sae check` on held-out paragraphs, 20 per language; 95 % bootstrap intervals over paragraphs."
    return Table("SAEs", columns, rows, caption).to_markdown()


def costs(folder: Path) -> str:
    """Processor time and peak memory of each step that `make real` ran."""
    rows: list[list[str | int | None]] = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        model, _, step = path.stem.partition("_")
        seconds = found.get("processor_seconds")
        minutes = None if seconds is None else max(1, round(seconds / 60))
        rows.append([model, step.replace("_", " "), minutes, found.get("peak_mib"), found["commit"]])
    caption = "Threads: 1. A dash: not measured. Commit: that of the code which ran."
    columns = ["model", "step", "processor time, minutes", "peak memory, MiB", "commit"]
    return Table("Time and memory", columns, rows, caption).to_markdown()


_ARMS = {
    "habit": (
        ("token penalty", "token penalty", "no"),
        ("SASFT, default", "SASFT", "yes"),
        ("difference of means", "SASFT along a difference of means", "no"),
        ("random features", "control: random features", "yes"),
    ),
    "zh": (
        ("SFT, the same rows without the switch", "clean data: the same rows without the switch", "no"),
        ("token penalty", "token penalty", "no"),
        ("KL anchor", "KL anchor", "no"),
        ("SASFT, default", "SASFT", "yes"),
        ("random features", "control: random features", "yes"),
    ),
}


def headline(folder: Path) -> str:
    """The README's table: what each method of SFT and GRPO did on a real model, and what it cost."""
    fine_tuned, negatives = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["tables"]
        for name in ("gemma3_sasft", "smollm2_negatives")
    )
    rows: list[list[str]] = []
    for setting, words in (("habit", _HABIT), ("zh", _SWITCHES)):
        found = {row[0]: row for row in fine_tuned[f"{setting}_methods"]["rows"]}
        weighted = {arm: "" if row[1] is None else f", weight {row[1]}" for arm, row in found.items()}
        sampled = {row[0]: with_unit(row[3], "%") for row in fine_tuned[f"{setting}_sampled"]["rows"]}
        rows.append([words, "plain SFT", "", "", sampled["SFT"], ""])
        for arm, method, sae in _ARMS[setting]:
            hazard, perplexity, chinese = (with_unit(cell, "%") for cell in found[arm][2:5])
            cost = f"perplexity {perplexity}; of Chinese {chinese}"
            rows.append([words, method + weighted[arm], sae, hazard, sampled.get(arm, ""), cost])
    found = {row[0]: row for row in negatives["loops"]["rows"]}
    rows.append([_LOOPS, "plain DAPO", "", "", with_unit(found["DAPO"][3], "%"), ""])
    for arm, method, sae in (
        ("seeded negative", "seeded negative", "no"),
        ("steered by features", "steered negative", "yes"),
        ("steered at random", "control: steered at random", "no"),
    ):
        _, _, right, share, loops, *_ = found[arm]
        cost = f"accuracy {with_unit(right, 'points')}"
        rows.append([_LOOPS, method, sae, with_unit(loops, "points"), with_unit(share, "%"), cost])
    said_once(rows)
    columns = ["trainer, model and failure", "method", "SAE", "hazard, loops: change", "responses that fail", "cost"]
    return Table("", columns, rows).to_markdown()


_HABIT = "SFT, Gemma 3 270M: a habit of switching into Chinese, then clean rows"
_SWITCHES = "SFT, Gemma 3 270M: half of the rows in other languages go on in Chinese"
_LOOPS = "GRPO, SmolLM2-135M: endless greedy loops"
