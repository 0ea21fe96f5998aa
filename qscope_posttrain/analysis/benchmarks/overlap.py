"""Measure how much two benchmarks share: directed overlap (Eq. 10), overlap_min (Eq. 11) and Jaccard, with intervals.

Raw overlaps depend on the sizes: a larger benchmark fires more features and so covers more of any other. Size-matched
overlaps compare random parts of n items of both, in exact expectation. A benchmark then has an overlap with itself
too, between two disjoint parts of it: the reference for every other benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures
from qscope_posttrain.analysis.benchmarks.redundancy import LeftOut, divide, jackknife_interval, presence, without_one
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval

Measure = Literal["overlap", "overlap_min", "jaccard"]
MEASURES: tuple[Measure, ...] = ("overlap", "overlap_min", "jaccard")
_MIN_ITEMS = 5


@dataclass(frozen=True, eq=False)
class SharedFeatures:
    """Sizes of two feature sets and of their intersection, or their expectations: numbers, or [N] without each item."""

    first: Any
    second: Any
    common: Any

    def measure(self, name: Measure) -> Any:
        """Eq. 10 (share of the first), Eq. 11 (share of the smaller), or common / union."""
        if name == "overlap":
            return divide(self.common, self.first)
        if name == "overlap_min":
            return divide(self.common, np.minimum(self.first, self.second))
        return divide(self.common, self.first + self.second - self.common)


@dataclass(frozen=True, eq=False)
class OverlapPair:
    """Two benchmarks, or one and itself, with the data for an interval of any measure."""

    first: str
    second: str
    shared: SharedFeatures
    left_out: Mapping[str, tuple[SharedFeatures, NDArray[np.int64]]]
    """By benchmark: the same without each of its items, and their units"""

    def value(self, name: Measure) -> float:
        return float(self.shared.measure(name))

    def interval(self, name: Measure, level: float = 0.95) -> Interval:
        parts = [(part.measure(name), units) for part, units in self.left_out.values()]
        return jackknife_interval(self.value(name), parts, level, (0.0, 1.0))


def raw_pair(first: ItemFeatures, second: ItemFeatures) -> OverlapPair:
    """Compare all items of both."""
    return _pair(first, second, len(first), len(second))


def matched_pair(first: ItemFeatures, second: ItemFeatures, size: int) -> OverlapPair:
    """Compare random parts of `size` items of each; of one benchmark with itself, two disjoint ones.

    Expected sizes stand for sizes, so a measure is a ratio of expectations. Parts of two benchmarks are drawn
    independently; with itself, P(both fire f) = 2 p(n) - p(2n), where p(n) is `redundancy.presence`.
    """
    for features in (first, second):
        needed = (2 * size if first is second else size) + 1
        if not 1 <= size < len(features) or len(features) < needed:
            raise UserValueError(
                f"parts of {size} items need at least {needed} here; '{features.name}' has {len(features)}."
            )
    if first is not second:
        return _pair(first, second, size, size)
    (one, *one_left), (two, *two_left) = _presence(first, size), _presence(first, 2 * size)
    shared = SharedFeatures(one.sum(), one.sum(), 2 * one.sum() - two.sum())
    each = first.leave_one_out(*one_left)
    without = SharedFeatures(each, each, 2 * each - first.leave_one_out(*two_left))
    return OverlapPair(first.name, first.name, shared, {first.name: (without, first.units)})


def largest_matched_size(benchmarks: Sequence[ItemFeatures]) -> int:
    """Largest size of which two disjoint parts fit into every benchmark, even without one of its items."""
    return (min(len(features) for features in benchmarks) - 1) // 2


@dataclass(frozen=True, eq=False)
class SharedItems:
    """Items of the first benchmark whose text the second has too."""

    items: int
    removed: bool  # Whether the larger benchmark went without them at equal size: where enough others remained


@dataclass(frozen=True, eq=False)
class Neighbor:
    """The benchmark most like another one at equal size, and its lead."""

    name: str
    nearest: str
    overlap: Interval
    next: str
    lead: Interval  # Over the benchmark with the least certain lead; with Bonferroni's correction for all the others


@dataclass(frozen=True, eq=False)
class OverlapMatrix:
    """All pairs of one layer."""

    names: tuple[str, ...]
    level: float
    size: int  # Number of items of the size-matched parts
    raw: Mapping[tuple[str, str], OverlapPair]  # By (first, second), both orders
    matched: Mapping[tuple[str, str], OverlapPair]  # Both orders, and each with itself
    shared_items: Mapping[tuple[str, str], SharedItems]

    def values(self, measure: Measure, matched: bool = False) -> NDArray[np.float64]:
        """[B, B]; the raw diagonal is 1."""
        table = np.eye(len(self.names))
        for (first, second), pair in (self.matched if matched else self.raw).items():
            table[self.names.index(first), self.names.index(second)] = pair.value(measure)
        return table

    def relative(self, first: str, second: str, level: float | None = None) -> Interval:
        """Size-matched overlap(first, second) as a share of the overlap of the first with itself. 1: a part of the
        second covers the features of a part of the first as well as another part of the first does."""
        cross, itself = self.matched[first, second], self.matched[first, first]
        own, own_units = itself.left_out[first]
        parts: list[LeftOut] = []
        for name, (shared, units) in cross.left_out.items():
            if name == first and np.array_equal(own_units, units):
                parts.append((divide(shared.measure("overlap"), own.measure("overlap")), units))
                continue
            parts.append((divide(shared.measure("overlap"), itself.value("overlap")), units))
            if name == first:  # items shared with the second are in one of the two only
                parts.append((divide(cross.value("overlap"), own.measure("overlap")), own_units))
        ratio = float(divide(cross.value("overlap"), itself.value("overlap")))
        return jackknife_interval(ratio, parts, level or self.level, (0.0, np.inf))

    def neighbor(self, name: str) -> Neighbor:
        """Nearest benchmark by size-matched overlap_min. At least three benchmarks are needed. It was chosen on the
        same data, so the lead is over EVERY other one, at the same level."""
        near = {other: self.matched[name, other] for other in self.names if other != name}
        nearest, *others = sorted(near, key=lambda other: -near[other].value("overlap_min"))
        level = 1 - (1 - self.level) / len(others)
        leads = [(self._lead(near[nearest], near[other], level), other) for other in others]
        lead, following = min(leads, key=lambda entry: entry[0].low)
        return Neighbor(name, nearest, near[nearest].interval("overlap_min", self.level), following, lead)

    @staticmethod
    def _lead(near: OverlapPair, far: OverlapPair, level: float) -> Interval:
        parts: list[LeftOut] = []
        for pair, sign in ((near, 1.0), (far, -1.0)):
            parts += [(sign * part.measure("overlap_min"), units) for part, units in pair.left_out.values()]
        # Parts of `name` in both pairs have the same units, so that their deviations are subtracted before squaring.
        return jackknife_interval(near.value("overlap_min") - far.value("overlap_min"), parts, level, (-1.0, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """Every measure of every pair, both orders, with limits."""

        def measured(pair: OverlapPair) -> dict[str, Any]:
            return {measure: pair.interval(measure, self.level)._asdict() for measure in MEASURES}

        pairs = []
        for (first, second), pair in self.raw.items():
            shared, matched = self.shared_items[first, second], measured(self.matched[first, second])
            entry: dict[str, Any] = {"first": first, "second": second, "shared_items": shared.items}
            entry["shared_items_left_out_at_equal_size"] = shared.removed
            entry |= measured(pair) | {f"{measure}_at_equal_size": found for measure, found in matched.items()}
            pairs.append(entry | {"relative_to_itself": self.relative(first, second)._asdict()})
        itself = {name: measured(self.matched[name, name]) for name in self.names}
        return {"size": self.size, "level": self.level, "with_itself_at_equal_size": itself, "pairs": pairs}


def measure_overlap(
    benchmarks: Sequence[ItemFeatures], *, size: int | None = None, level: float = 0.95
) -> OverlapMatrix:
    """Measure raw and size-matched overlaps of all pairs.

    Items of the same text would make any two benchmarks alike: for the size-matched pair they are left out of the
    larger one, as far as enough others remain. The raw pair keeps them, as the formulas do. `size` is the number of
    items of the size-matched parts, by default `largest_matched_size`.
    """
    names = tuple(features.name for features in benchmarks)
    if len(names) < 2 or len(set(names)) != len(names):
        raise UserValueError(
            f"overlap needs at least two benchmarks of different names, got {', '.join(names) or 'none'}."
        )
    if min(map(len, benchmarks)) < _MIN_ITEMS:
        raise UserValueError(f"overlap needs at least {_MIN_ITEMS} items in every benchmark.")
    matched_size = largest_matched_size(benchmarks) if size is None else size
    raw, matched, shared = {}, {}, {}
    for first in benchmarks:
        for second in benchmarks:
            key = first.name, second.name
            if first is second:
                matched[key] = matched_pair(first, first, matched_size)
                continue
            raw[key] = raw_pair(first, second)
            one, other = without_shared(first, second, matched_size + 1)
            matched[key] = matched_pair(one, other, matched_size)
            removed = len(one) + len(other) < len(first) + len(second)
            shared[key] = SharedItems(int(first.also_in(second).sum()), removed)
    return OverlapMatrix(names, level, matched_size, raw, matched, shared)


def without_shared(first: ItemFeatures, second: ItemFeatures, at_least: int) -> tuple[ItemFeatures, ItemFeatures]:
    """Remove from the larger set the items that it shares with the other, unless fewer than `at_least` would remain."""
    # Of two of one size the choice must not depend on their order, or the matrix would not be symmetric.
    smaller, larger = sorted((first, second), key=lambda features: (len(features), features.name))
    twice = larger.also_in(smaller)
    if not twice.any() or len(larger) - int(twice.sum()) < at_least:
        return first, second
    rest = larger.select(~twice)
    return (rest, second) if larger is first else (first, rest)


def _presence(features: ItemFeatures, size: int) -> list[NDArray[np.float64]]:
    """Probability that a random part fires each feature: [of all items, of one fewer if the item left out does not fire
    it, if it does]."""
    items, counts = len(features), features.counts
    left = (presence(after, items - 1, min(size, items - 1)) for after in without_one(counts, items))
    return [presence(counts, items, size), *left]


def _pair(first: ItemFeatures, second: ItemFeatures, first_size: int, second_size: int) -> OverlapPair:
    (one, *one_left), (other, *other_left) = _presence(first, first_size), _presence(second, second_size)
    shared = SharedFeatures(one.sum(), other.sum(), one @ other)
    if shared.first == 0 or shared.second == 0:
        raise UserValueError(f"no feature fires on any item of '{(first if shared.first == 0 else second).name}'.")
    common = (first.leave_one_out(*(p * other for p in one_left)), second.leave_one_out(*(p * one for p in other_left)))
    without_first = SharedFeatures(first.leave_one_out(*one_left), shared.second, common[0])
    without_second = SharedFeatures(shared.first, second.leave_one_out(*other_left), common[1])
    left_out = {first.name: (without_first, first.units), second.name: (without_second, second.units)}
    return OverlapPair(first.name, second.name, shared, left_out)
