"""The report of a switching experiment as sections of an HTML page, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.experiments.cell_results import CellResult, cell_results
from benchmarks.experiments.clustered import ClusteredInterval
from benchmarks.experiments.cost_curves import CostCurve, cost_curves
from benchmarks.experiments.equal_cost import BUDGETS, cost_curve
from benchmarks.experiments.models_section import models_section
from benchmarks.experiments.switching_rows import Measure, switching_rows
from benchmarks.experiments.switching_tables import cell_tables, verdict_table
from benchmarks.testbed.plots import Mark
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.html import Figure, Section
from qscope_posttrain.report.tables import Table

_SHOWN_BUDGETS = 4.0
"""Plots end at this many times the largest budget: coefficients far beyond it would squeeze the rest."""
_PAGE_ONLY = ("pairs", "runs")
"""Tables that are too wide or too long for a terminal."""
_FOUND = (
    "Arms have coefficients of different units, so they are compared at equal cost: each run's curve of switching "
    "against perplexity, over its coefficients, is read off at a budget. Coefficients, and the arms that stand for the "
    "SAE and for the controls below, were chosen on validation prompts; all numbers are from test prompts. 'No "
    "difference shown' is not 'equal': the interval of the difference contains 0."
)
_PLOTTED: tuple[Measure, ...] = ("hazard", "sampled")


def switching_report(
    rows: Iterable[Mapping[str, Any]],
    worlds: Sequence[Mapping[str, Any]] = (),
    titles: Mapping[str, str] | None = None,
    budgets: Sequence[float] = BUDGETS,
) -> tuple[list[Section], dict[str, Table]]:
    """Build the report of a switching experiment.

    Args:
        rows: rows of `runs.jsonl`; those of another kind are left out.
        worlds: what is known of each base model, see `switching_grid.run_switching_cell`.
        titles: cell -> title; a cell's name by default.
        budgets: rises of perplexity over SFT in per cent at which arms are compared; weights are chosen at the largest.

    Returns:
        Sections of the page: the table of all cells, then each cell with curves, tables and every run, then the models;
        and tables for the terminal by name, "verdicts" first and then "<cell>/<table>".

    Raises:
        ValueError: no switching rows, rows that do not fit (see `switching_rows`), or a run without its SFT.
    """
    parsed = switching_rows(rows)
    if not parsed:
        raise UserValueError('there are no rows of kind "switching" to report on.')
    results = cell_results(parsed, budgets)
    names = {result.cell: (titles or {}).get(result.cell, result.cell) for result in results}
    tables = {"verdicts": verdict_table(results, names)}
    sections = [Section("What was found", _FOUND, tables=[tables["verdicts"]])]
    for result in results:
        own = cell_tables(result, names[result.cell])
        tables |= {f"{result.cell}/{name}": table for name, table in own.items() if name not in _PAGE_ONLY}
        sections.append(_cell_section(result, names[result.cell], own))
    if worlds:
        sections.append(models_section(worlds, names))
    return sections, tables


def _cell_section(result: CellResult, title: str, tables: Mapping[str, Table]) -> Section:
    figures = [figure for measure in _PLOTTED if (figure := _curve_plot(result, measure))]
    parts = [
        Section("Tables", tables=[table for name, table in tables.items() if name != "runs"]),
        Section("Single runs", tables=[tables["runs"]]),
    ]
    return Section(title, _description(result), figures=figures, sections=parts)


def _description(result: CellResult) -> str:
    runs = {(row.base, row.seed) for row in result.rows}
    seen = "its script" if result.identify == "script" else "its words, as it has no script of its own"
    acted = "" if result.penalised is None else f" The arms act on prompts in {', '.join(result.penalised)} only."
    models = "base model" if result.bases == 1 else "base models"
    return (
        f"Target: {result.target}, recognised by {seen}. {result.bases} {models}, {len(runs)} pairs of base model and "
        f"seed, {len(result.titles)} arms beside SFT.{acted}"
    )


def _curve_plot(result: CellResult, measure: Measure) -> Figure | None:
    """Switching against cost; None without samples where these are asked for."""
    curves, costs = [], []
    for arm, pairs in result.pairs.items():
        usable = [pair for pair in pairs if measure != "sampled" or pair.has_samples]
        if usable:
            points = cost_curve(usable, measure)
            costs += [point.cost.estimate for point in points]
            marks = [
                Mark(
                    f"{point.weight:g}",
                    point.cost.estimate / 100,
                    point.effect.estimate / 100,
                    _limits(point.cost),
                    _limits(point.effect),
                )
                for point in points
            ]
            curves.append(CostCurve(result.titles[arm], marks, dashed=arm not in result.sae_arms))
    if not curves:
        return None
    limit = _SHOWN_BUDGETS * max(result.budgets)
    beyond = sum(cost > limit for cost in costs)
    svg = cost_curves(
        curves,
        f"{result.cost_name} against SFT",
        "hazard of switching against SFT" if measure == "hazard" else "sampled switching against SFT",
        [budget / 100 for budget in result.budgets],
        limit / 100,
    )
    caption = (
        "Down is less switching, right costs more; + is SFT, a marker is a coefficient, solid lines are SAE arms, "
        "dashed ones controls. Means over runs on test prompts with 95 % intervals both ways; vertical lines: budgets."
    )
    if beyond:
        noun = "coefficient lies" if beyond == 1 else "coefficients lie"
        caption += f" {beyond} {noun} to the right of the plot; they are in the table of every run."
    return Figure(svg, caption)


def _limits(interval: ClusteredInterval) -> tuple[float, float] | None:
    return None if math.isnan(interval.low) else (interval.low / 100, interval.high / 100)
