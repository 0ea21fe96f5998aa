"""The base models of a switching experiment: fit, SAEs, causal checks, how switches are identified."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qscope_posttrain.report.html import Section
from qscope_posttrain.report.tables import Cell, Table


def models_section(worlds: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> Section:
    """Build a section with the base models, their causal checks, and the false alarms of identification by words.

    Args:
        worlds: as `switching_grid.run_switching_cell` gives them. Cells that share a model share its causal check.
        titles: cell -> title.
    """
    checks: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for world in worlds:
        check = world.get("causal_check")
        if check is not None:
            content = check.to_dict() if isinstance(check, Table) else check
            key = json.dumps([world["base"], content], sort_keys=True)
            checks.setdefault(key, (content, []))[1].append(f"{_title(world, titles)}, base {world['base']}")
    causal = [
        Table(f"{'; '.join(places)}: {content['title']}", content["columns"], content["rows"], content["caption"])
        for content, places in checks.values()
    ]
    alarms = [row for world in worlds for row in _false_alarms(world, titles)]
    parts = [Section("Are the features causal?", tables=causal)] if causal else []
    if alarms:
        columns = ["cell", "base", "source", "clean texts", "called switched", "%", "95 %"]
        caption = "Clean texts of a response's length on which the thresholds were set, and how many exceed them."
        parts.append(Section("False alarms", tables=[Table("Identification by words", columns, alarms, caption)]))
    return Section("The models", tables=[_models_table(worlds, titles)], sections=parts)


def _models_table(worlds: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> Table:
    rows: list[list[Cell]] = []
    for world in worlds:
        variance = ", ".join(f"layer {layer}: {share:.3f}" for layer, share in world["explained_variance"].items())
        rows.append([_title(world, titles), world["base"], world["loss"], variance, world["target_tokens"]])
    columns = ["cell", "base", "pretraining loss, nats", "SAE, explained variance", "tokens of the target"]
    return Table("Base models", columns, rows, "Loss: mean of the last 50 steps of pretraining.")


def _false_alarms(world: Mapping[str, Any], titles: Mapping[str, str]) -> list[list[Cell]]:
    calibration = (world.get("identification") or {}).get("calibration", {})
    rows: list[list[Cell]] = []
    for source, entry in calibration.items():
        rate = entry["rate"]
        limits = f"{100 * rate['low']:.2f} .. {100 * rate['high']:.2f}"
        counts = [entry["texts"], entry["false_positives"], round(100 * rate["estimate"], 2), limits]
        rows.append([_title(world, titles), world["base"], source, *counts])
    return rows


def _title(world: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    return titles.get(world["cell"], world["cell"])
