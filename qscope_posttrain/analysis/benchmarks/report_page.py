"""A benchmark analysis as sections of a report, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qscope_posttrain.analysis.benchmarks.overlap import MEASURES, OverlapMatrix
from qscope_posttrain.analysis.benchmarks.redundancy import Redundancy
from qscope_posttrain.report.html import Figure, Section
from qscope_posttrain.report.plots import Curve, Mark, heat_map, line_curves, scatter_with_intervals
from qscope_posttrain.report.tables import Table


def redundancy_section(
    found: Sequence[Redundancy], where: str, tables: Sequence[Table], more: Sequence[Figure] = ()
) -> Section:
    """Coverage against items and against the share of them, the tables, and further figures."""
    curves, shares = [], []
    for entry in found:
        band = entry.sampled
        low, high = (band.low.tolist(), band.high.tolist()) if band else (None, None)
        coverage = entry.coverage.tolist()
        curves.append(Curve(entry.name, entry.sizes.tolist(), coverage, low, high))
        shares.append(Curve(entry.name, (entry.sizes / entry.items).tolist(), coverage, low, high))
    bands = " Bands: 95 % of random subsets." if found[0].sampled else ""
    figures = [
        Figure(
            line_curves(curves, "items", "features reached", percent=True),
            f"Share of a benchmark's features that n random items fire, in exact expectation.{bands}",
        ),
        Figure(
            line_curves(shares, "share of the items", "features reached", percent=True),
            "The same against the share of the items; the area below is AUC, never under one half.",
        ),
    ]
    return Section(f"Redundancy, {where}", tables=tables, figures=[*figures, *more])


def overlap_section(matrix: OverlapMatrix, where: str, tables: Sequence[Table]) -> Section:
    """Heat maps at equal size and raw, and the tables."""
    names = matrix.names
    figures = [
        Figure(
            heat_map(matrix.values("overlap_min", matched=True).tolist(), names, names),
            f"overlap_min at {matrix.size} random items each; on the diagonal that of two disjoint parts of one "
            "benchmark, the most that one of its kind would reach.",
        ),
        Figure(
            heat_map(matrix.values("overlap").tolist(), names, names, peak=1.0),
            "Raw directed overlap: share of the features of the row that fire in the column too. Large columns cover "
            "more because they are large.",
        ),
        Figure(heat_map(matrix.values("overlap_min").tolist(), names, names, peak=1.0), "Raw overlap_min."),
    ]
    return Section(f"Overlap, {where}", tables=tables, figures=figures)


def agreement_figure(
    names: Sequence[str], x: Sequence[float], y: Sequence[float], x_label: str, y_label: str
) -> Figure:
    """A point a benchmark or pair."""
    marks = [Mark(name, a, b) for name, a, b in zip(names, x, y, strict=True)]
    return Figure(scatter_with_intervals(marks, x_label, y_label))


def overlap_results(matrix: OverlapMatrix) -> dict[str, Any]:
    """Every measure of every pair, both orders, with limits."""
    pairs = []
    for (first, second), pair in matrix.raw.items():
        shared = matrix.shared_items[first, second]
        entry: dict[str, Any] = {"first": first, "second": second, "shared_items": shared.items}
        entry["shared_items_left_out_at_equal_size"] = shared.removed
        for measure in MEASURES:
            entry[measure] = pair.interval(measure, matrix.level)._asdict()
            matched = matrix.matched[first, second].interval(measure, matrix.level)
            entry[f"{measure}_at_equal_size"] = matched._asdict()
        if shared.kept is not None:
            with_them = shared.kept.interval("overlap_min", matrix.level)
            entry["overlap_min_at_equal_size_with_shared_items"] = with_them._asdict()
        entry["relative_to_itself"] = matrix.relative(first, second)._asdict()
        pairs.append(entry)
    itself = {
        name: {measure: matrix.matched[name, name].interval(measure, matrix.level)._asdict() for measure in MEASURES}
        for name in matrix.names
    }
    return {"size": matrix.size, "level": matrix.level, "with_itself_at_equal_size": itself, "pairs": pairs}
