"""Numbers of a repetition experiment: one arm against another from the same starts with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.experiments.clustered import ClusteredInterval, clustered_interval
from benchmarks.experiments.grouping import by_base
from benchmarks.experiments.rare_counts import Count, pooled, rate_over_runs, rate_ratio
from benchmarks.experiments.repetition_rows import (
    RepetitionRow,
    accuracy_difference,
    benign_difference,
    loop_difference,
    pair_up,
)
from benchmarks.testbed.repetition.experiment import Quality
from qscope_posttrain.intervals import Interval, wilson

FEWER = 0.1
"""Goal: at most this many times DAPO's loops ..."""
POINTS = 0.5
"""... for at most this many points of accuracy."""

Goal = Literal["met", "met by the estimates", "missed by the estimates", "missed"]
Which = Literal["quality", "benign"]


@dataclass(frozen=True)
class LoopRate:
    """Loops of an arm over all its runs."""

    loops: int
    samples: int
    over_runs: Interval | None
    """Bootstrap over runs; None without a loop, or of a single run."""
    wilson: Interval
    """As if all samples were independent; the one to read where there is no other."""

    @property
    def shown(self) -> Interval:
        """The outer limits of both: few runs can agree by chance, and samples of one run are not independent."""
        if self.over_runs is None:
            return self.wilson
        low, high = min(self.over_runs.low, self.wilson.low), max(self.over_runs.high, self.wilson.high)
        return Interval(self.wilson.estimate, low, high)


@dataclass(frozen=True)
class Comparison:
    """An arm against another, over the pairs of runs that both have."""

    pairs: int
    loops: tuple[int, int]
    """Of both arms in these pairs."""
    ratio: Interval
    """Of their loop rates, see `rare_counts.rate_ratio`."""
    loop_difference: ClusteredInterval
    """In 10,000 samples."""
    accuracy: ClusteredInterval
    """Difference in points."""
    benign_ratio: Interval
    """Of loop rates on problems whose steps are rightly equal."""
    benign_accuracy: ClusteredInterval
    """Difference in points."""

    @property
    def goal(self) -> Goal:
        """Whether the arm loops a tenth as often at most, for half a point of accuracy at most.

        "met" and "missed" if the intervals say so, else what the estimates alone say.
        """
        if self.ratio.high <= FEWER and self.accuracy.low >= -POINTS:
            return "met"
        if self.ratio.low > FEWER or self.accuracy.high < -POINTS:
            return "missed"
        if self.ratio.estimate <= FEWER and self.accuracy.estimate >= -POINTS:
            return "met by the estimates"
        return "missed by the estimates"


def counts(rows: Sequence[RepetitionRow], which: Which = "quality") -> list[Count]:
    """Loops of every run."""
    return [Count(row.base, _quality(row, which).loops, _quality(row, which).samples) for row in rows]


def loop_rate(rows: Sequence[RepetitionRow], which: Which = "quality") -> LoopRate:
    """Pooled over runs; ValueError without any."""
    per_run = counts(rows, which)
    loops, samples = pooled(per_run)
    return LoopRate(loops, samples, rate_over_runs(per_run), wilson(loops, samples))


def right_share(rows: Sequence[RepetitionRow], which: Which = "quality") -> float:
    """Right answers of all runs together, a share."""
    return sum(_quality(row, which).right for row in rows) / sum(_quality(row, which).samples for row in rows)


def compare(rows: Sequence[RepetitionRow], references: Sequence[RepetitionRow]) -> Comparison | None:
    """An arm's runs against another's of one cell; None where they have no base and seed in common."""
    pairs = pair_up(rows, references)
    if not pairs:
        return None
    own, others = [pair.run for pair in pairs], [pair.reference for pair in pairs]
    return Comparison(
        pairs=len(pairs),
        loops=(sum(row.quality.loops for row in own), sum(row.quality.loops for row in others)),
        ratio=rate_ratio(counts(own), counts(others)),
        loop_difference=clustered_interval(by_base(pairs, loop_difference)),
        accuracy=clustered_interval(by_base(pairs, accuracy_difference)),
        benign_ratio=rate_ratio(counts(own, "benign"), counts(others, "benign")),
        benign_accuracy=clustered_interval(by_base(pairs, benign_difference)),
    )


def looped_share(rows: Sequence[RepetitionRow]) -> ClusteredInterval | None:
    """Share of the negatives that repeat without end; None for an arm without negatives."""
    grouped: dict[int, list[float]] = {}
    for row in rows:
        if row.looped_share is not None:
            grouped.setdefault(row.base, []).append(row.looped_share)
    return clustered_interval(grouped) if grouped else None


def last_probe(rows: Sequence[RepetitionRow], name: str) -> ClusteredInterval:
    """A probe after the last update."""
    grouped: dict[int, list[float]] = {}
    for row in rows:
        grouped.setdefault(row.base, []).append(getattr(row.last_probes, name))
    return clustered_interval(grouped)


def probe_curve(rows: Sequence[RepetitionRow], name: str) -> tuple[list[int], list[float]]:
    """Updates at which every run was probed, and the mean over runs of a probe there."""
    steps = sorted(set.intersection(*(set(row.probes) for row in rows)))
    return steps, [sum(getattr(row.probes[step], name) for row in rows) / len(rows) for step in steps]


def mean_gradient_norm(rows: Sequence[RepetitionRow]) -> float | None:
    """Mean over runs; None without training."""
    norms = [row.gradient_norm for row in rows if row.gradient_norm is not None]
    return sum(norms) / len(norms) if norms else None


def steered_otherwise(arms: Mapping[str, Sequence[RepetitionRow]]) -> dict[str, list[int]]:
    """Arms that were steered in another way than theirs, since theirs made nothing loop: title -> bases."""
    found: dict[str, list[int]] = {}
    for rows in arms.values():
        bases = sorted({row.base for row in rows if row.way is not None and row.way[0] != row.way[1]})
        if bases:
            found[rows[0].title] = bases
    return found


def ratio_text(ratio: Interval) -> str:
    """`0.36 (0.15 .. 0.80)`; a limit alone where one count is 0, and a dash where both are."""
    if math.isnan(ratio.estimate):
        return "-"
    if ratio.estimate == 0:
        return f"0 (at most {ratio.high:.2g})"
    if math.isinf(ratio.estimate):
        return f"at least {ratio.low:.2g}"
    return f"{ratio.estimate:.2g} ({ratio.low:.2g} .. {ratio.high:.2g})"


def signed_text(interval: ClusteredInterval, digits: int = 1) -> str:
    """`+0.8 (-0.9 .. +2.5)`; the estimate alone where there is no interval."""
    if math.isnan(interval.low):
        return f"{interval.estimate:+.{digits}f}"
    return f"{interval.estimate:+.{digits}f} ({interval.low:+.{digits}f} .. {interval.high:+.{digits}f})"


def percent_text(interval: Interval | ClusteredInterval | None, digits: int = 1) -> str:
    """A share in per cent with its limits, which end at 0 and 100; a dash for None."""
    if interval is None:
        return "-"
    estimate = f"{100 * interval.estimate:.{digits}f}"
    if math.isnan(interval.low):
        return estimate
    low, high = max(0.0, interval.low), min(1.0, interval.high)
    return f"{estimate} ({100 * low:.{digits}f} .. {100 * high:.{digits}f})"


def _quality(row: RepetitionRow, which: Which) -> Quality:
    return row.quality if which == "quality" else row.benign
