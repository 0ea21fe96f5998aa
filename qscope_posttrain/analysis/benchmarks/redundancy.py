"""How fast the features of a benchmark are reached by a part of its items: coverage (Eq. 7) and R-hat (Eq. 8, 9)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures
from qscope_posttrain.analysis.benchmarks.jackknife import divide, jackknife_interval
from qscope_posttrain.analysis.benchmarks.rarefaction import expected_features, presence, presence_over_sizes
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval

CURVE_POINTS = 128
"""Subset sizes at which the curve is written down; R-hat never depends on them."""


@dataclass(frozen=True, eq=False)
class SampledCurve:
    """The same from random subsets: a check of the exact curve, and the spread of single subsets around it.

    The subsets of one repeat are nested: the first n items of a random order, for every n.
    """

    repeats: int
    low: NDArray[np.float64]
    """[sizes] 2.5 % of the subsets cover less"""
    high: NDArray[np.float64]
    """[sizes] 2.5 % of the subsets cover more"""
    r_hat: float
    """Mean over the repeats, each one from its own curve at every n"""
    r_hat_error: float
    """Its standard error"""


@dataclass(frozen=True, eq=False)
class Redundancy:
    """What `measure_redundancy` found in one benchmark and layer."""

    name: str
    items: int
    features: int
    """|F(D)|"""
    mean_features: float
    """Features of an item on average"""
    empty: int
    cut: int
    """Items of which only the end was read"""
    r_hat: Interval
    area: Interval
    """AUC of Eq. 8. It lies between (N + 1) / 2N and 1 whatever the benchmark, see `measure_redundancy`."""
    matched_size: int
    r_hat_matched: Interval
    """R-hat of a random part of `matched_size` items, which compares benchmarks of different sizes"""
    items_for_90: int
    """Random items that reach 90 % of the features on average"""
    sizes: NDArray[np.int64]
    coverage: NDArray[np.float64]
    """c_n at `sizes`"""
    sampled: SampledCurve | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, intervals as {estimate, low, high}."""
        values = asdict(self)
        for name in ("r_hat", "area", "r_hat_matched"):
            values[name] = getattr(self, name)._asdict()
        return values


def measure_redundancy(
    features: ItemFeatures, *, matched_size: int | None = None, repeats: int = 100, level: float = 0.95, seed: int = 0
) -> Redundancy:
    """R-hat(D) = (sum_{n=1}^{N} c_n) / |F(D)| with c_n = E |F(S)| / |F(D)| over the subsets of n items (Eq. 7 to 9).

    The expectation is exact. With m_f the number of items that fire feature f (see `rarefaction`),

        sum_n E |F(S)| = (N + 1) sum_f m_f / (m_f + 1)

    so that AUC = (N + 1) / N times the mean of m / (m + 1) over the features, between (N + 1) / 2N and 1: R-hat is
    N / |F(D)| up to a factor of two, and benchmarks of different sizes are compared at `matched_size`.

    Args:
        matched_size: n of the size-matched R-hat, (sum_{j<=n} E |F(S_j)|) / (E |F(S_n)|)^2; by default half the items.
        repeats: random orders behind `sampled`; 0 leaves it out.
        level: of the intervals, see `jackknife`.

    Raises:
        ValueError: fewer than 3 items, nothing fires, or a size that leaves no item out.
    """
    items, counts = len(features), features.counts
    if items < 3:
        raise UserValueError(f"'{features.name}' has {items} items; at least 3 are needed.")
    if features.features == 0:
        raise UserValueError(f"no feature fires on any item of '{features.name}'.")
    matched = items // 2 if matched_size is None else matched_size
    if not 1 <= matched < items:
        raise UserValueError(f"matched_size must lie between 1 and {items - 1} for '{features.name}', got {matched}.")
    sizes = curve_sizes(items)
    coverage = expected_features(counts, items, sizes) / features.features
    return Redundancy(
        name=features.name,
        items=items,
        features=features.features,
        mean_features=float(features.sizes.mean()),
        empty=features.empty,
        cut=features.cut,
        r_hat=_r_hat(features, items, level),
        area=_area(features, level),
        matched_size=matched,
        r_hat_matched=_r_hat(features, matched, level),
        items_for_90=_items_for(0.9, features),
        sizes=sizes,
        coverage=coverage,
        sampled=sample_coverage(features, sizes, repeats, seed) if repeats else None,
    )


def curve_sizes(items: int) -> NDArray[np.int64]:
    """Subset sizes from 1 to N, dense where the curve bends: all of them where there are few."""
    even = np.linspace(1, items, CURVE_POINTS // 2)
    return np.unique(np.rint(np.concatenate([even, np.geomspace(1, items, CURVE_POINTS // 2)])).astype(np.int64))


def sample_coverage(features: ItemFeatures, sizes: NDArray[np.int64], repeats: int, seed: int) -> SampledCurve:
    """Coverage along `repeats` random orders of the items.

    A feature is reached at the first item that fires it, so one order costs one minimum over the entries.
    """
    generator = np.random.default_rng(seed)
    items, total = len(features), features.features
    owners = np.repeat(np.arange(items), features.sizes)[np.argsort(features.indices, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(features.counts[features.counts > 0])[:-1]])
    curves, areas = [], []
    for _ in range(repeats):
        reached = np.minimum.reduceat(generator.permutation(items)[owners], starts)
        covered = np.cumsum(np.bincount(reached, minlength=items)) / total
        curves.append(covered[sizes - 1])
        areas.append(covered.sum() / total)
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    error = float(np.std(areas, ddof=1)) / math.sqrt(repeats) if repeats > 1 else math.nan
    return SampledCurve(repeats, low, high, float(np.mean(areas)), error)


def _r_hat(features: ItemFeatures, size: int, level: float) -> Interval:
    """R-hat of a random part of `size` items; of all of them, Eq. 9."""
    items, counts = len(features), features.counts
    estimate = presence_over_sizes(counts, items, size).sum() / presence(counts, items, size).sum() ** 2
    size = min(size, items - 1)
    reached = leave_one_out(
        features, presence(counts.clip(max=items - 1), items - 1, size), presence(_fewer(counts), items - 1, size)
    )
    area = leave_one_out(
        features,
        presence_over_sizes(counts.clip(max=items - 1), items - 1, size),
        presence_over_sizes(_fewer(counts), items - 1, size),
    )
    left_out = divide(area, reached**2)
    return jackknife_interval(float(estimate), [(left_out, features.units)], level, (0.0, math.inf))


def _area(features: ItemFeatures, level: float) -> Interval:
    items, counts = len(features), features.counts
    fires = counts > 0
    estimate = (items + 1) / items * float((counts[fires] / (counts[fires] + 1)).mean())
    kept, fewer = counts.clip(max=items - 1), _fewer(counts)
    total = leave_one_out(features, kept / (kept + 1), fewer / (fewer + 1))
    alive = leave_one_out(features, kept > 0, fewer > 0)
    left_out = items / (items - 1) * divide(total, alive)
    return jackknife_interval(estimate, [(left_out, features.units)], level, ((items + 1) / (2 * items), 1.0))


def leave_one_out(features: ItemFeatures, kept: NDArray[Any], fewer: NDArray[Any]) -> NDArray[np.float64]:
    """[N] the sum over all features without each item.

    Args:
        kept: [width] what a feature adds if the item left out does not fire it.
        fewer: [width] what it adds if that item does, with a count less by one.
    """
    kept, fewer = kept.astype(np.float64), fewer.astype(np.float64)
    return kept.sum() + features.sum_over_features(fewer - kept)


def _fewer(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts without an item that fires the feature; where none fires it, no matter what."""
    return (counts - 1).clip(min=0)


def _items_for(share: float, features: ItemFeatures) -> int:
    """Smallest n with c_n >= share, by bisection: c_n rises with n."""
    low, high = 0, len(features)
    while high - low > 1:
        middle = (low + high) // 2
        covered = expected_features(features.counts, len(features), [middle])[0]
        low, high = (low, middle) if covered >= share * features.features else (middle, high)
    return high
