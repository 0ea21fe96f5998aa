"""The numbers of a benchmark analysis as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qscope_posttrain.analysis.benchmarks.agreement import Agreement
from qscope_posttrain.analysis.benchmarks.overlap import OverlapMatrix
from qscope_posttrain.analysis.benchmarks.performance import PerformanceRedundancy
from qscope_posttrain.analysis.benchmarks.recommendation import Recommendation, groups
from qscope_posttrain.analysis.benchmarks.redundancy import Redundancy
from qscope_posttrain.intervals import Interval
from qscope_posttrain.report.tables import Table


def in_words(interval: Interval) -> str:
    """Estimate and limits, three digits."""
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def redundancy_table(found: Sequence[Redundancy], where: str, level: float) -> Table:
    """A row a benchmark."""
    size = found[0].matched_size
    rows = [
        (
            entry.name,
            entry.items,
            entry.features,
            entry.mean_features,
            in_words(entry.r_hat),
            entry.sampled.r_hat if entry.sampled else None,
            entry.area.estimate,
            in_words(entry.r_hat_matched),
            entry.items_for_90,
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
    columns = [
        "benchmark", "items N", "features", "per item", "R-hat", "R-hat, sampled", "AUC", f"R-hat at n = {size}",
        "items for 90 %",
    ]  # fmt: skip
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
    rows = [
        (
            line.predictor,
            line.target,
            line.correlation.kind,
            line.correlation.value,
            f"[{line.correlation.low:.2f}, {line.correlation.high:.2f}]",
            line.correlation.p,
            line.correlation.benchmarks,
            line.correlation.points,
        )
        for line in lines
    ]
    caption = (
        "Intervals: bootstrap over benchmarks, too narrow for few of them. p: two-sided, by permuting benchmarks, not "
        f"pairs. {note}"
    )
    columns = ["from", "with", "coefficient", "value", "95 %", "p", "benchmarks", "points"]
    return Table(title, columns, rows, caption.strip())


def overlap_table(matrix: OverlapMatrix, where: str) -> Table:
    """A row for every pair."""
    rows = []
    for number, first in enumerate(matrix.names):
        for second in matrix.names[number + 1 :]:
            raw, matched = matrix.raw[first, second], matrix.matched[first, second]
            rows.append(
                (
                    first,
                    second,
                    in_words(raw.interval("overlap", matrix.level)),
                    in_words(matrix.raw[second, first].interval("overlap", matrix.level)),
                    in_words(raw.interval("overlap_min", matrix.level)),
                    raw.value("jaccard"),
                    in_words(matched.interval("overlap_min", matrix.level)),
                    in_words(matrix.relative(first, second)),
                    in_words(matrix.relative(second, first)),
                    _shared(matrix, first, second),
                )
            )
    columns = [
        "A", "B", "overlap(A, B)", "overlap(B, A)", "overlap_min", "Jaccard", f"overlap_min at n = {matrix.size}",
        "B covers A, relative", "A covers B, relative", "items in both",
    ]  # fmt: skip
    caption = (
        f"Raw overlaps depend on sizes; at n = {matrix.size} items each they do not. Relative: overlap at equal size "
        "as a share of what another part of the same benchmark covers. Limits, by the jackknife, for new items of the "
        "same kind and number. Items in both are left out at equal size where enough others remain."
    )
    return Table(f"Overlap of features, {where}", columns, rows, caption)


def neighbour_table(matrix: OverlapMatrix, where: str) -> Table:
    """The nearest benchmark of each, and how sure its lead is. At least three benchmarks."""
    rows = []
    for name in matrix.names:
        found = matrix.neighbour(name)
        sure = "yes" if found.lead.low > 0 else "not decided"
        itself = matrix.matched[name, name].value("overlap_min")
        rows.append((name, found.nearest, in_words(found.overlap), itself, in_words(found.lead), found.next, sure))
    columns = ["benchmark", "nearest", "overlap_min", "with itself", "lead", "over", "lead above 0"]
    caption = (
        f"overlap_min of {matrix.size} random items each, items in both left out. The lead is over the benchmark that "
        f"it is least sure over, at {matrix.level:.0%} for all others together (Bonferroni)."
    )
    return Table(f"Nearest benchmarks, {where}", columns, rows, caption)


def recommendation_table(lines: Sequence[Recommendation], where: str, threshold: float) -> Table:
    """merge, keep or drop, with the reason."""
    rows = [(line.name, line.action, line.other, line.reason) for line in lines]
    joined = "; ".join(" + ".join(group) for group in groups(lines))
    caption = (
        f"Threshold {threshold:g}. About the features of one layer of one model; limits hold for all others of a line "
        "together. A line takes all others as kept: act on one at a time, and look first at what a benchmark measures "
        "that no feature shows."
    )
    caption += f" To merge: {joined}." if joined else ""
    return Table(f"Recommendation, {where}", ["benchmark", "action", "with", "reason"], rows, caption)


def _shared(matrix: OverlapMatrix, first: str, second: str) -> str:
    shared = matrix.shared_items[first, second]
    if shared.kept is None:
        return str(shared.items)
    return f"{shared.items}; with them {in_words(shared.kept.interval('overlap_min', matrix.level))}"
