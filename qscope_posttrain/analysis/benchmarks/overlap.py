"""How much two benchmarks share: directed overlap (Eq. 10), overlap_min (Eq. 11) and Jaccard, with intervals.

Raw overlaps depend on the sizes: a larger benchmark fires more features and so covers more of any other. Size-matched
overlaps compare random parts of n items of both, in exact expectation. There a benchmark has an overlap with itself
too, between two disjoint parts of it: what another one of its kind would reach, against which the rest is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures
from qscope_posttrain.analysis.benchmarks.jackknife import LeftOut, divide, jackknife_interval
from qscope_posttrain.analysis.benchmarks.rarefaction import presence
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval

Measure = Literal["overlap", "overlap_min", "jaccard"]
MEASURES: tuple[Measure, ...] = ("overlap", "overlap_min", "jaccard")
_FEWEST = 5


@dataclass(frozen=True, eq=False)
class Shared:
    """Sizes of two feature sets and of their intersection, or expectations of them; as numbers, or [N] without each
    item."""

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
class Pair:
    """Two benchmarks, or one and itself, with what is needed for an interval of any measure."""

    first: str
    second: str
    shared: Shared
    left_out: Mapping[str, tuple[Shared, NDArray[np.int64]]]
    """By benchmark: the same without each of its items, and their units"""

    def value(self, name: Measure) -> float:
        return float(self.shared.measure(name))

    def interval(self, name: Measure, level: float = 0.95) -> Interval:
        parts = [(part.measure(name), units) for part, units in self.left_out.values()]
        return jackknife_interval(self.value(name), parts, level, (0.0, 1.0))


def raw_pair(first: ItemFeatures, second: ItemFeatures) -> Pair:
    """All items of both."""
    _check(first, second)
    return _pair(first, second, len(first), len(second))


def matched_pair(first: ItemFeatures, second: ItemFeatures, size: int) -> Pair:
    """Random parts of `size` items of each; of one benchmark with itself, two disjoint ones.

    Expected sizes stand for sizes, so a measure is a ratio of expectations. Parts of two benchmarks are drawn
    independently; with itself, P(both fire f) = 2 p(n) - p(2n), where p(n) is `rarefaction.presence`.

    Raises:
        ValueError: fewer than size + 1 items, with itself 2 * size + 1.
    """
    _check(first, second)
    for features in (first, second):
        needed = (2 * size if first is second else size) + 1
        if not 1 <= size < len(features) or len(features) < needed:
            raise UserValueError(
                f"parts of {size} items need at least {needed} here; '{features.name}' has {len(features)}."
            )
    return _with_itself(first, size) if first is second else _pair(first, second, size, size)


def largest_matched_size(benchmarks: Sequence[ItemFeatures]) -> int:
    """Two disjoint parts fit into every benchmark, even without one of its items."""
    return (min(len(features) for features in benchmarks) - 1) // 2


def _pair(first: ItemFeatures, second: ItemFeatures, first_size: int, second_size: int) -> Pair:
    one, other = _Presence.of(first, first_size), _Presence.of(second, second_size)
    shared = Shared(one.full.sum(), other.full.sum(), one.full @ other.full)
    if shared.first == 0 or shared.second == 0:
        raise UserValueError(f"no feature fires on any item of '{(first if shared.first == 0 else second).name}'.")
    without_first = Shared(one.without_each(), shared.second, one.without_each(other.full))
    without_second = Shared(shared.first, other.without_each(), other.without_each(one.full))
    left_out = {first.name: (without_first, first.units), second.name: (without_second, second.units)}
    return Pair(first.name, second.name, shared, left_out)


def _with_itself(features: ItemFeatures, size: int) -> Pair:
    one, two = _Presence.of(features, size), _Presence.of(features, 2 * size)
    shared = Shared(one.full.sum(), one.full.sum(), 2 * one.full.sum() - two.full.sum())
    each = one.without_each()
    without = Shared(each, each, 2 * each - two.without_each())
    return Pair(features.name, features.name, shared, {features.name: (without, features.units)})


@dataclass(frozen=True, eq=False)
class _Presence:
    """Probability that a random part fires each feature: of all items, and of one fewer."""

    features: ItemFeatures
    full: NDArray[np.float64]
    kept: NDArray[np.float64]
    """Without an item that does not fire the feature"""
    fewer: NDArray[np.float64]
    """Without one that does"""

    @classmethod
    def of(cls, features: ItemFeatures, size: int) -> _Presence:
        items, counts = len(features), features.counts
        size_left = min(size, items - 1)
        return cls(
            features,
            presence(counts, items, size),
            presence(counts.clip(max=items - 1), items - 1, size_left),
            presence((counts - 1).clip(min=0), items - 1, size_left),
        )

    def without_each(self, weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """[N] sum over features of probability times weight, without each item."""
        kept, fewer = (self.kept, self.fewer) if weights is None else (self.kept * weights, self.fewer * weights)
        return kept.sum() + self.features.sum_over_features(fewer - kept)


def _check(first: ItemFeatures, second: ItemFeatures) -> None:
    if first.width != second.width:
        raise UserValueError(
            f"'{first.name}' has {first.width} features and '{second.name}' {second.width}: not one dictionary."
        )
    for features in (first, second):
        if len(features) < 2:
            raise UserValueError(f"'{features.name}' has {len(features)} items; at least 2 are needed.")


@dataclass(frozen=True, eq=False)
class SharedItems:
    """Items of the first benchmark whose text the second has too."""

    items: int
    removed: bool
    """From the larger one, before the size-matched comparison; False too where too few others remained"""
    kept: Pair | None = None
    """The size-matched pair with them, where they were removed"""


@dataclass(frozen=True, eq=False)
class Neighbour:
    """The benchmark most like another one at equal size, and by how much it leads."""

    name: str
    nearest: str
    overlap: Interval
    next: str
    lead: Interval
    """Over the one it leads least surely; with Bonferroni's correction for all the others"""


@dataclass(frozen=True, eq=False)
class OverlapMatrix:
    """All pairs of one layer."""

    names: tuple[str, ...]
    level: float
    size: int
    """Items of the size-matched parts"""
    raw: Mapping[tuple[str, str], Pair]
    """By (first, second), both orders"""
    matched: Mapping[tuple[str, str], Pair]
    """Both orders, and each with itself"""
    shared_items: Mapping[tuple[str, str], SharedItems]

    def values(self, measure: Measure, matched: bool = False) -> NDArray[np.float64]:
        """[B, B]; the raw diagonal is 1."""
        pairs = self.matched if matched else self.raw
        table = np.eye(len(self.names))
        for (first, second), pair in pairs.items():
            table[self.names.index(first), self.names.index(second)] = pair.value(measure)
        return table

    def relative(self, first: str, second: str, level: float | None = None) -> Interval:
        """Size-matched overlap(first, second) as a share of the overlap of the first with itself.

        1: a part of the second covers the features of a part of the first as well as another part of the first does.
        """
        cross, itself = self.matched[first, second], self.matched[first, first]
        parts: list[LeftOut] = []
        for name, (shared, units) in cross.left_out.items():
            own = itself.left_out[first]
            if name == first and np.array_equal(own[1], units):
                parts.append((divide(shared.measure("overlap"), own[0].measure("overlap")), units))
                continue
            parts.append((divide(shared.measure("overlap"), itself.value("overlap")), units))
            if name == first:  # items shared with the second are in one of the two only
                parts.append((divide(cross.value("overlap"), own[0].measure("overlap")), own[1]))
        ratio = float(divide(cross.value("overlap"), itself.value("overlap")))
        return jackknife_interval(ratio, parts, level or self.level, (0.0, np.inf))

    def neighbour(self, name: str) -> Neighbour:
        """Nearest by size-matched overlap_min. At least three benchmarks are needed.

        Which one is nearest was looked up in the same data, so the lead is over EVERY other one, at the same level.
        """
        others = sorted((other for other in self.names if other != name), key=lambda other: -self._near(name, other))
        level = 1 - (1 - self.level) / (len(others) - 1)
        leads = [(self._lead(name, others[0], other, level), other) for other in others[1:]]
        lead, following = min(leads, key=lambda entry: entry[0].low)
        overlap = self.matched[name, others[0]].interval("overlap_min", self.level)
        return Neighbour(name, others[0], overlap, following, lead)

    def _near(self, first: str, second: str) -> float:
        return self.matched[first, second].value("overlap_min")

    def _lead(self, name: str, nearest: str, other: str, level: float) -> Interval:
        near, far = self.matched[name, nearest], self.matched[name, other]
        parts: list[LeftOut] = []
        for pair, sign in ((near, 1.0), (far, -1.0)):
            parts += [(sign * part.measure("overlap_min"), units) for part, units in pair.left_out.values()]
        # Parts of `name` in both pairs have the same units, so that their deviations are subtracted before squaring.
        return jackknife_interval(self._near(name, nearest) - self._near(name, other), parts, level, (-1.0, 1.0))


def measure_overlap(
    benchmarks: Sequence[ItemFeatures], *, size: int | None = None, level: float = 0.95
) -> OverlapMatrix:
    """Raw and size-matched overlaps of all pairs.

    Items of the same text in two benchmarks would make these alike whatever they are about: in the size-matched pair
    they are left out of the larger one, as far as enough others remain. The raw pair keeps them, as the formulas do.

    Args:
        size: items of the size-matched parts; by default the most that the smallest benchmark allows,
            `largest_matched_size`.

    Raises:
        ValueError: fewer than two benchmarks or than 5 items, different dictionaries, a name used twice, a size that
            is too large.
    """
    names = tuple(features.name for features in benchmarks)
    if len(names) < 2 or len(set(names)) != len(names):
        raise UserValueError(
            f"overlap needs at least two benchmarks of different names, got {', '.join(names) or 'none'}."
        )
    if min(map(len, benchmarks)) < _FEWEST:
        raise UserValueError(f"overlap needs at least {_FEWEST} items in every benchmark.")
    matched_size = largest_matched_size(benchmarks) if size is None else size
    raw, matched, shared = {}, {}, {}
    for first in benchmarks:
        for second in benchmarks:
            names_ = first.name, second.name
            if first is second:
                matched[names_] = matched_pair(first, first, matched_size)
                continue
            raw[names_] = raw_pair(first, second)
            one, other = without_shared(first, second, matched_size + 1)
            matched[names_] = matched_pair(one, other, matched_size)
            removed = len(one) + len(other) < len(first) + len(second)
            kept = matched_pair(first, second, matched_size) if removed else None
            shared[names_] = SharedItems(int(first.also_in(second).sum()), removed, kept)
    return OverlapMatrix(names, level, matched_size, raw, matched, shared)


def without_shared(first: ItemFeatures, second: ItemFeatures, at_least: int) -> tuple[ItemFeatures, ItemFeatures]:
    """Both, the larger one without the items that the other has too, if `at_least` so many others remain."""
    # Of two of one size the choice must not depend on their order, or the matrix would not be symmetric.
    smaller, larger = sorted((first, second), key=lambda features: (len(features), features.name))
    twice = larger.also_in(smaller)
    if not twice.any() or len(larger) - int(twice.sum()) < at_least:
        return first, second
    rest = larger.select(~twice)
    return (rest, second) if larger is first else (first, rest)
