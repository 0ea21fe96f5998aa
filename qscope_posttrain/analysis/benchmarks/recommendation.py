"""Which benchmarks to merge, keep or drop, by their features: a proposal with its numbers, no stronger than these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qscope_posttrain.analysis.benchmarks.correlation import fisher_interval
from qscope_posttrain.analysis.benchmarks.overlap import OverlapMatrix
from qscope_posttrain.analysis.benchmarks.performance import ScoreTable
from qscope_posttrain.analysis.benchmarks.redundancy import Redundancy
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval

Action = Literal["merge", "drop", "keep", "keep (undecided)"]
COVERED = 0.9
"""Share of a benchmark's overlap with itself from which another one counts as covering it."""


@dataclass(frozen=True)
class Recommendation:
    """One benchmark and what its features suggest."""

    name: str
    action: Action
    other: str
    """The benchmark that covers it best, relative to itself"""
    covered: Interval
    """Size-matched overlap with that one as a share of its overlap with itself; Bonferroni over the others"""
    back: Interval
    """The same the other way round"""
    lost: float
    """Share of all its features that do not fire anywhere in the other: what dropping it would lose"""
    reason: str


def recommend(
    overlap: OverlapMatrix,
    redundancy: Mapping[str, Redundancy] | None = None,
    scores: ScoreTable | None = None,
    threshold: float = COVERED,
) -> list[Recommendation]:
    """A line for every benchmark A, by the benchmark B that covers it best.

    With covered = `OverlapMatrix.relative(A, B)`, the interval of it, and t the threshold:

        merge   both low ends reach t: at equal size each covers the other as well as itself, within the threshold
        drop    the low end for A reaches t, the high end for B does not: B covers A, and A does not cover B
        keep    no high end for A, against any other, reaches t: all others miss features that A fires again and again
        keep (undecided)   otherwise: the items do not decide

    It is about the features of one layer of one model, and the scores, where given, are quoted, not used.

    Raises:
        ValueError: a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise UserValueError(f"the threshold is a share above 0 and up to 1, got {threshold}.")
    level = 1 - (1 - overlap.level) / (len(overlap.names) - 1)
    return [_line(name, overlap, level, redundancy or {}, scores, threshold) for name in overlap.names]


def _line(
    name: str,
    overlap: OverlapMatrix,
    level: float,
    redundancy: Mapping[str, Redundancy],
    scores: ScoreTable | None,
    threshold: float,
) -> Recommendation:
    shares = {other: overlap.relative(name, other, level) for other in overlap.names if other != name}
    best = max(shares, key=lambda other: shares[other].low)
    covered, back = shares[best], overlap.relative(best, name, level)
    lost = 1 - overlap.raw[name, best].value("overlap")
    action: Action
    if covered.low >= threshold:
        action = "merge" if back.low >= threshold else "drop" if back.high < threshold else "keep (undecided)"
    else:
        action = "keep" if max(share.high for share in shares.values()) < threshold else "keep (undecided)"
    reason = _reason(action, best, covered, back, lost, threshold)
    shared = overlap.shared_items[name, best]
    if shared.items:
        reason += f"; {shared.items} of its items are in {best} too"
        reason += ", left out of this comparison" if shared.removed else ", and count here"
    if name in redundancy:
        found = redundancy[name]
        reason += f"; {found.items_for_90} of its {found.items} items reach 90 % of its features"
    if scores is not None and {name, best} <= set(scores.benchmarks):
        r = fisher_interval(float(scores.similarity([name, best])[0, 1]), len(scores.models))
        reason += f"; scores of {len(scores.models)} models on the two correlate with r = {_in_words(r)}"
    return Recommendation(name, action, best, covered, back, lost, reason)


def _reason(action: Action, best: str, covered: Interval, back: Interval, lost: float, threshold: float) -> str:
    share = f"at equal size {best} covers {_in_words(covered)} of what the benchmark covers of itself"
    other_way = f"the other way round {_in_words(back)}"
    if action == "merge":
        return f"{share}, {other_way}: not told apart by features; {lost:.0%} of its features fire nowhere in {best}"
    if action == "drop":
        return f"{share}, {other_way}; dropping it loses {lost:.0%} of its features, the rare ones among them"
    if action == "keep":
        return f"the best cover falls short of {threshold:g}: {share}"
    if covered.low >= threshold:
        return f"{share}, but whether it covers {best} too is not decided by so many items: {other_way}"
    return f"whether any other reaches {threshold:g} is not decided by so many items: {share}"


def _in_words(interval: Interval) -> str:
    return f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def groups(lines: Sequence[Recommendation]) -> list[tuple[str, ...]]:
    """Benchmarks joined by "merge" lines, directly or over others."""
    found: list[set[str]] = []
    for line in lines:
        if line.action == "merge":
            together = {line.name, line.other}
            apart = [group for group in found if not group & together]
            found = [*apart, together.union(*(group for group in found if group & together))]
    return [tuple(sorted(group)) for group in found]
