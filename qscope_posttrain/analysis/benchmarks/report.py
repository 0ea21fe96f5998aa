"""Report a benchmark analysis: tables, figures, and which benchmarks to merge, keep or drop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qscope_posttrain.analysis.benchmarks.overlap import Measure, OverlapMatrix
from qscope_posttrain.analysis.benchmarks.performance import Agreement, PerformanceRedundancy
from qscope_posttrain.analysis.benchmarks.redundancy import Redundancy
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval
from qscope_posttrain.report.html import Figure, Section
from qscope_posttrain.report.plots import Curve, heat_map, line_curves
from qscope_posttrain.report.tables import Cell, Table

Action = Literal["merge", "drop", "keep", "keep (undecided)"]
COVERED = 0.9  # Share of a benchmark's overlap with itself from which another one counts as covering it


@dataclass(frozen=True)
class Recommendation:
    """Proposal for one benchmark, with its numbers."""

    name: str
    action: Action
    other: str  # The benchmark that covers it best, relative to itself
    covered: Interval  # Size-matched overlap with it, as a share of that with itself; Bonferroni over the others
    back: Interval  # The same in the other direction
    lost: float  # Share of all its features that do not fire anywhere in the other: the loss if it is dropped
    reason: str


def recommend(
    overlap: OverlapMatrix,
    redundancy: Mapping[str, Redundancy] | None = None,
    threshold: float = COVERED,
) -> list[Recommendation]:
    """Recommend which benchmarks to merge, keep or drop, based on feature overlap.

    Every benchmark A is judged by the benchmark B that covers it best. With covered = `OverlapMatrix.relative(A, B)`,
    the interval of it, and t the threshold:

        merge   both low ends reach t: at equal size each covers the other as well as itself, within the threshold
        drop    the low end for A reaches t, the high end for B does not: B covers A, and A does not cover B
        keep    no high end for A, against any other, reaches t: all others miss features that A fires again and again
        keep (undecided)   otherwise: there are too few items to tell

    It is about the features of one layer of one model.
    """
    if not 0 < threshold <= 1:
        raise UserValueError(f"the threshold is a share above 0 and up to 1, got {threshold}.")
    level = 1 - (1 - overlap.level) / (len(overlap.names) - 1)
    found = []
    for name in overlap.names:
        shares = {other: overlap.relative(name, other, level) for other in overlap.names if other != name}
        best = max(shares, key=lambda other: shares[other].low)
        covered, back = shares[best], overlap.relative(best, name, level)
        lost = 1 - overlap.raw[name, best].value("overlap")
        action: Action = "keep (undecided)"
        if covered.low >= threshold:
            action = "merge" if back.low >= threshold else "drop" if back.high < threshold else action
        elif max(share.high for share in shares.values()) < threshold:
            action = "keep"
        reason = _reason(action, best, covered, back, lost, threshold)
        shared = overlap.shared_items[name, best]
        if shared.items:
            reason += f"; {shared.items} of its items are in {best} too"
            reason += ", left out of this comparison" if shared.removed else ", and count here"
        if redundancy is not None and name in redundancy:
            reached = redundancy[name]
            reason += f"; {reached.items_for_90} of its {reached.items} items reach 90 % of its features"
        found.append(Recommendation(name, action, best, covered, back, lost, reason))
    return found


def _reason(action: Action, best: str, covered: Interval, back: Interval, lost: float, threshold: float) -> str:
    share = f"at equal size {best} covers {covered.text('.2f')} of what the benchmark covers of itself"
    both = f"{share}, in the other direction {back.text('.2f')}"
    if action == "merge":
        return f"{both}: features do not distinguish them; {lost:.0%} of its features fire nowhere in {best}"
    if action == "drop":
        return f"{both}; dropping it loses {lost:.0%} of its features, the rare ones among them"
    if action == "keep":
        return f"the best cover falls short of {threshold:g}: {share}"
    if covered.low >= threshold:
        return f"{both}; too few items to tell whether it also covers {best}"
    return f"too few items to tell whether any other reaches {threshold:g}: {share}"


def groups(lines: Sequence[Recommendation]) -> list[tuple[str, ...]]:
    """Benchmarks joined by "merge" lines, directly or through others."""
    found: list[set[str]] = []
    for line in lines:
        if line.action == "merge":
            together = {line.name, line.other}
            apart = [group for group in found if not group & together]
            found = [*apart, together.union(*(group for group in found if group & together))]
    return [tuple(sorted(group)) for group in found]


def redundancy_table(found: Sequence[Redundancy], where: str, level: float) -> Table:
    """One row per benchmark."""
    size = found[0].matched_size
    rows = [
        (
            *(entry.name, entry.items, entry.features, entry.mean_features, entry.r_hat.text()),
            entry.sampled.r_hat if entry.sampled else None,
            *(entry.area.estimate, entry.r_hat_matched.text(), entry.items_for_90),
        )
        for entry in found
    ]
    caption = (
        f"R-hat is exact for these items; [{level:.0%} limits] are for new items of the same kind and number, by the "
        "jackknife. AUC lies between (N + 1) / 2N and 1 for any benchmark, so R-hat is N / features within a factor of "
        f"two: compare benchmarks of different sizes at n = {size}. "
    )
    empty = [f"{entry.name} {entry.empty}" for entry in found if entry.empty]
    cut = [f"{entry.name} {entry.cut}" for entry in found if entry.cut]
    caption += f"Items on which nothing fires: {', '.join(empty)}. " if empty else ""
    caption += f"Items of which only the end was read: {', '.join(cut)}." if cut else ""
    columns = ["benchmark", "items N", "features", "per item", "R-hat", "R-hat, sampled", "AUC"]
    columns += [f"R-hat at n = {size}", "items for 90 %"]
    return Table(f"Redundancy by features, {where}", columns, rows, caption.strip())


def performance_table(found: Mapping[str, PerformanceRedundancy]) -> Table:
    """R of every benchmark with per-item correctness."""
    rows = [(entry.name, entry.items, entry.models, entry.r, entry.error) for entry in found.values()]
    caption = (
        "R: mean over subset sizes of Kendall's tau-b between model accuracies on random subsets and on all items. The "
        "standard error is that of the random subsets; another choice of models would move R by more."
    )
    return Table("Redundancy by performance", ["benchmark", "items N", "models", "R", "standard error"], rows, caption)


def agreement_table(title: str, lines: Sequence[Agreement], note: str = "") -> Table:
    """Correlations with their test over benchmarks."""
    rows: list[list[Cell]] = []
    for line in lines:
        r = line.correlation
        limits = f"[{r.low:.2f}, {r.high:.2f}]" if math.isfinite(r.value) else None
        rows.append([line.predictor, line.target, r.kind, r.value, limits, r.p, r.benchmarks, r.points])
    caption = (
        "Intervals: bootstrap over benchmarks, too narrow for few of them. p: two-sided, by permuting benchmarks, not "
        f"pairs. {note}"
    )
    if not all(math.isfinite(line.correlation.value) for line in lines):
        caption = f"{caption.strip()} A dash: one side is the same for all benchmarks."
    columns = ["from", "with", "coefficient", "value", "95 %", "p", "benchmarks", "points"]
    return Table(title, columns, rows, caption.strip())


def overlap_table(matrix: OverlapMatrix, where: str) -> Table:
    """One row per pair."""
    rows: list[list[Cell]] = []
    for number, first in enumerate(matrix.names):
        for second in matrix.names[number + 1 :]:
            raw, matched = matrix.raw[first, second], matrix.matched[first, second]
            shared = matrix.shared_items[first, second]
            directed = (pair.interval("overlap", matrix.level).text() for pair in (raw, matrix.raw[second, first]))
            least, least_matched = (pair.interval("overlap_min", matrix.level).text() for pair in (raw, matched))
            relative = (matrix.relative(first, second).text(), matrix.relative(second, first).text())
            rows.append([first, second, *directed, least, raw.value("jaccard"), least_matched, *relative, shared.items])
    columns = ["A", "B", "overlap(A, B)", "overlap(B, A)", "overlap_min", "Jaccard"]
    columns += [f"overlap_min at n = {matrix.size}", "B covers A, relative", "A covers B, relative", "items in both"]
    caption = (
        f"Raw overlaps depend on sizes; at n = {matrix.size} items each they do not. Relative: overlap at equal size "
        "as a share of what another part of the same benchmark covers. Limits, by the jackknife, for new items of the "
        "same kind and number. Items in both are left out at equal size where enough others remain."
    )
    return Table(f"Overlap of features, {where}", columns, rows, caption)


def neighbor_table(matrix: OverlapMatrix, where: str) -> Table:
    """The nearest benchmark of each, and its lead. At least three benchmarks."""
    rows = []
    for name in matrix.names:
        found = matrix.neighbor(name)
        sure = "yes" if found.lead.low > 0 else "not decided"
        itself = matrix.matched[name, name].value("overlap_min")
        rows.append((name, found.nearest, found.overlap.text(), itself, found.lead.text(), found.next, sure))
    columns = ["benchmark", "nearest", "overlap_min", "with itself", "lead", "over", "lead above 0"]
    caption = (
        f"overlap_min of {matrix.size} random items each, items in both left out. The lead is over the benchmark where "
        f"it is least certain, at {matrix.level:.0%} for all others together (Bonferroni)."
    )
    return Table(f"Nearest benchmarks, {where}", columns, rows, caption)


def recommendation_table(lines: Sequence[Recommendation], where: str, threshold: float) -> Table:
    """One row per benchmark: merge, keep or drop, with the reason."""
    rows = [(line.name, line.action, line.other, line.reason) for line in lines]
    joined = "; ".join(" + ".join(group) for group in groups(lines))
    caption = (
        f"Threshold {threshold:g}. About the features of one layer of one model; limits hold for all others of a line "
        "together. A line assumes that all others are kept: act on one at a time, and look first at what a benchmark "
        "measures that no feature shows."
    )
    caption += f" To merge: {joined}." if joined else ""
    return Table(f"Recommendation, {where}", ["benchmark", "action", "with", "reason"], rows, caption)


def redundancy_section(found: Sequence[Redundancy], where: str, tables: Sequence[Table]) -> Section:
    """Coverage against items and against the share of them, and the tables."""
    curves, shares = [], []
    for entry in found:
        band = entry.sampled
        low, high = (band.low.tolist(), band.high.tolist()) if band else (None, None)
        coverage = entry.coverage.tolist()
        curves.append(Curve(entry.name, entry.sizes.tolist(), coverage, low, high))
        shares.append(Curve(entry.name, (entry.sizes / entry.items).tolist(), coverage, low, high))
    bands = " Bands: 95 % of random subsets." if found[0].sampled else ""
    words = f"Share of a benchmark's features that n random items fire, in exact expectation.{bands}"
    same = "The same against the share of the items; the area below is AUC, never under one half."
    drawn = ((curves, "items", words), (shares, "share of the items", same))
    figures = [Figure(line_curves(of, x, "features reached", percent=True), caption) for of, x, caption in drawn]
    return Section(f"Redundancy, {where}", tables=tables, figures=figures)


def overlap_section(matrix: OverlapMatrix, where: str, tables: Sequence[Table]) -> Section:
    """Heat maps at equal size and raw, and the tables."""

    def figure(measure: Measure, caption: str, matched: bool = False) -> Figure:
        values, names = matrix.values(measure, matched).tolist(), matrix.names
        return Figure(heat_map(values, names, names, peak=None if matched else 1.0), caption)

    equal = (
        f"overlap_min at {matrix.size} random items each; on the diagonal that of two disjoint parts of one benchmark, "
        "the most that one of its kind would reach."
    )
    raw = (
        "Raw directed overlap: share of the features of the row that fire in the column too. Large columns cover more "
        "because they are large."
    )
    figures = [figure("overlap_min", equal, matched=True), figure("overlap", raw)]
    return Section(f"Overlap, {where}", tables=tables, figures=[*figures, figure("overlap_min", "Raw overlap_min.")])
