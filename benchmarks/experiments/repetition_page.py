"""The report of a repetition experiment as sections of an HTML page, from its rows and what is known of the starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.experiments.arms import REPETITION_ARMS as ARMS
from benchmarks.experiments.grouping import by_cell
from benchmarks.experiments.repetition_numbers import compare, loop_rate, probe_curve
from benchmarks.experiments.repetition_rows import KIND, RepetitionRow, by_arm, check_references, repetition_rows
from benchmarks.experiments.repetition_tables import comparison_table, effects_table, loops_table, runs_table
from benchmarks.testbed.plots import Bar, Mark, interval_bars, scatter_with_intervals
from benchmarks.testbed.repetition.config import PLAIN
from benchmarks.testbed.repetition.experiment import START
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.html import Figure, Section
from qscope_posttrain.report.plots import Curve, line_curves
from qscope_posttrain.report.tables import Cell, Table

PROBES = {"oend": "endless, once entered", "oh": "entry: the second copy", "oc1": "continuation: the third copy"}
"""Teacher-forced probes that are drawn over updates, and what they are called."""
_WAYS = {"window": "features, in a window", "to_end": "features, to the end", "window_means": "means, in a window"}


def repetition_report(
    rows: Iterable[Mapping[str, Any]], worlds: Sequence[Mapping[str, Any]] = (), titles: Mapping[str, str] | None = None
) -> tuple[list[Section], dict[str, Table]]:
    """Build the sections for `report.html`, and the tables to print and store.

    Args:
        rows: rows of `runs.jsonl`; those of another kind are left out.
        worlds: what `run_repetition_bases` says of the start checkpoints; without them there are no dose curves.
        titles: cell -> title; a cell's name by default.

    Raises:
        ValueError: no repetition rows, rows that do not fit (see `repetition_rows`), or a run without its plain DAPO.
    """
    parsed = repetition_rows(rows)
    if not parsed:
        raise UserValueError(f'there are no rows of kind "{KIND}" to report on.')
    check_references(parsed)
    sections: list[Section] = []
    tables: dict[str, Table] = {}
    for cell, own in by_cell(parsed).items():
        title = (titles or {}).get(cell, cell)
        found = repetition_tables(own, title)
        mine = [world for world in worlds if world.get("kind") == KIND and world["cell"] == cell]
        sections.append(_cell_section(own, title, found, mine))
        tables |= {f"{cell}:{name}": table for name, table in found.items() if name != "runs"}
        if mine:
            tables[f"{cell}:starts"] = starts_table(mine, title)
        tables[f"{cell}:runs"] = found["runs"]
    return sections, tables


def repetition_tables(rows: Sequence[RepetitionRow], title: str) -> dict[str, Table]:
    """All tables of one cell by name: loops, effects, against (if there is such a pair), runs."""
    against = comparison_table(rows, title)
    return {
        "loops": loops_table(rows, title),
        **({"against": against} if against.rows else {}),
        "effects": effects_table(rows, title),
        "runs": runs_table(rows, title),
    }


def starts_table(worlds: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The start checkpoints of one cell, and what was chosen to steer each of them with."""
    lines: list[list[Cell]] = []
    for world in worlds:
        explained = ", ".join(f"{value:.2f}" for value in world["explained_variance"].values())
        steering = [_steering_text(world["steering"][way], world["way_in_use"][way] == way) for way in _WAYS]
        loops = f"{world['own_loops']} of {world['own_samples']}"
        lines.append([world["base"], world["parameters"], world["loss"], loops, explained, *steering])
    caption = (
        "Loss: mean of the last 50 pretraining steps. Own loops: what the probes and the features come from. Explained "
        "variance of the SAEs by layer. Steering: layer, strength in median residual norms, and the share of steered "
        "completions that loop as the model itself does, against random directions of equal length, on completions "
        "that it was not chosen by."
    )
    columns = ["base", "parameters", "loss", "own loops", "explained", *_WAYS.values()]
    return Table(f"Start checkpoints: {title}", columns, lines, caption)


def _steering_text(chosen: Mapping[str, Any] | None, own: bool) -> str:
    if chosen is None or not own:
        return "nothing loops"
    rates = f"{100 * chosen['own_looped']:.0f} % against {100 * chosen['own_random']:.0f} %"
    return f"layer {chosen['layer']} at {chosen['strength']:g}: {rates}"


def _cell_section(
    rows: Sequence[RepetitionRow], title: str, tables: Mapping[str, Table], worlds: Sequence[Mapping[str, Any]]
) -> Section:
    arms = by_arm(rows)
    shown = [tables[name] for name in ("loops", "against") if name in tables]
    parts = [Section("What else changed", tables=[tables["effects"]])]
    if _trained(arms):
        parts.append(Section("Probes over updates", _PROBES_TEXT, figures=_probe_plots(arms)))
    if worlds:
        curves = [table for world in worlds for table in _dose_tables(world)]
        parts.append(Section("Start checkpoints and dose curves", tables=[starts_table(worlds, title), *curves]))
    parts.append(Section("Every run", tables=[tables["runs"]]))
    return Section(title, _text(arms), tables=shown, figures=[_loops_plot(arms), *_cost_plot(arms)],
                   sections=parts)  # fmt: skip


_PROBES_TEXT = (
    "Probabilities on the start models' own loops, teacher forced, mean over runs. They have no sampling noise, but "
    "know exact repeats of known loops only, and can fall while sampled loops do not."
)


def _text(arms: Mapping[str, Sequence[RepetitionRow]]) -> str:
    lines = []
    for name, runs in arms.items():
        if name in ARMS:
            lines.append(f"- **{runs[0].title}**: {ARMS[name].description}")
    return "\n".join(lines)


def _trained(arms: Mapping[str, Sequence[RepetitionRow]]) -> dict[str, Sequence[RepetitionRow]]:
    return {name: runs for name, runs in arms.items() if name != START}


def _loops_plot(arms: Mapping[str, Sequence[RepetitionRow]]) -> Figure:
    bars = []
    for runs in arms.values():
        rate = loop_rate(runs)
        points = tuple(row.quality.loops / row.quality.samples for row in runs)
        bars.append(Bar(runs[0].title, rate.shown.estimate, rate.shown.low, rate.shown.high, points))
    svg = interval_bars(
        [_in_percent(bar) for bar in bars], "samples that repeat without end, %", reference=arms[PLAIN][0].title
    )
    return Figure(
        svg,
        "Sampled completions that repeat to the length limit; dots: runs. Outer limits of the 95 % intervals over "
        "runs and of Wilson's.",
    )


def _in_percent(bar: Bar) -> Bar:
    low, high = (None if limit is None else 100 * limit for limit in (bar.low, bar.high))
    return Bar(bar.name, 100 * bar.value, low, high, tuple(100 * point for point in bar.points))


def _cost_plot(arms: Mapping[str, Sequence[RepetitionRow]]) -> list[Figure]:
    """Loops against the difference in accuracy; nothing where plain DAPO is alone."""
    marks = []
    for name, runs in _trained(arms).items():
        found = None if name == PLAIN else compare(runs, arms[PLAIN])
        if found is not None:
            rate = loop_rate(runs).shown
            cost = found.accuracy
            limits = None if math.isnan(cost.low) else (cost.low, cost.high)
            loops = (100 * rate.low, 100 * rate.high)
            marks.append(Mark(runs[0].title, cost.estimate, 100 * rate.estimate, limits, loops))
    if not marks:
        return []
    plain = loop_rate(arms[PLAIN]).shown
    marks.append(Mark(arms[PLAIN][0].title, 0.0, 100 * plain.estimate, None, (100 * plain.low, 100 * plain.high)))
    svg = scatter_with_intervals(marks, "right answers against DAPO, points", "samples that repeat without end, %")
    return [Figure(svg, "What a method gains (down) against what it costs (left), with 95 % intervals.")]


def _probe_plots(arms: Mapping[str, Sequence[RepetitionRow]]) -> list[Figure]:
    figures = []
    for name, label in PROBES.items():
        curves = [Curve(runs[0].title, *probe_curve(runs, name)) for runs in _trained(arms).values()]
        figures.append(Figure(line_curves(curves, "update", label, percent=True), f"{label}, mean over runs."))
    return figures


def _dose_tables(world: Mapping[str, Any]) -> list[Table]:
    """The ranking of features once, and the curve of every way to steer, of one start checkpoint."""
    found = []
    for way, tables in world["dose"].items():
        for name, content in tables.items():
            if name != "ranking" or way == "window":
                table = Table(**content)
                about = "" if name == "ranking" else f", {_WAYS[way]}"
                found.append(Table(f"{table.title}, base {world['base']}{about}", table.columns, table.rows,
                                   table.caption))  # fmt: skip
    return found
