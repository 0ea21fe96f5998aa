"""Measure how fast a part of a benchmark's items reaches its features: coverage (Eq. 7) and R-hat (Eq. 8, 9).

Expectations over random subsets are exact. Let m items of N fire a feature. A uniformly random subset of n items
misses it with probability

    q(N, m, n) = C(N - m, n) / C(N, n)

so that E |F(S)| = sum_f 1 - q(N, m_f, n), the rarefaction of ecology (Hurlbert 1971). Over sizes it telescopes:

    sum_{j=0}^{n} q(N, m, j) = (N + 1) / (m + 1) * (1 - C(N - m, n + 1) / C(N + 1, n + 1))

Intervals are jackknife intervals. The bootstrap is wrong here: a resample of N items holds about 0.63 N different ones,
and a union of sets does not grow by an item that it has, so every resampled union is too small. Efron and Stein (1981):
for independent items, sum_i (T_-i - mean T_-i)^2 is on average at least the variance of the statistic on one item
fewer, for ANY statistic, so these intervals err on the wide side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln
from scipy.stats import t as student_t

from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval

CURVE_POINTS = 128  # Subset sizes at which the curve is written down; R-hat never depends on them

LeftOut = tuple[NDArray[np.float64], NDArray[np.int64]]  # A statistic without each item [N], the unit of each


@dataclass(frozen=True, eq=False)
class SampledCurve:
    """Coverage of random subsets: a check of the exact curve, and the spread of single subsets around it. The subsets
    of one repeat are nested: the first n items of a random order, for every n."""

    repeats: int
    low: NDArray[np.float64]  # [sizes] 2.5 % quantile
    high: NDArray[np.float64]  # [sizes] 97.5 % quantile
    r_hat: float  # Mean over the repeats, each one from its own curve at every n
    r_hat_error: float  # Its standard error


@dataclass(frozen=True, eq=False)
class Redundancy:
    """Result of `measure_redundancy` for one benchmark and layer."""

    name: str
    items: int
    features: int  # |F(D)|
    mean_features: float  # Mean number of features per item
    empty: int  # Number of items that fire nothing
    cut: int  # Number of items of which only the end was read
    r_hat: Interval
    area: Interval  # AUC of Eq. 8. It lies between (N + 1) / 2N and 1 for any benchmark, see `measure_redundancy`.
    matched_size: int
    r_hat_matched: Interval  # R-hat of a random part of `matched_size` items, to compare benchmarks of different sizes
    items_for_90: int  # Number of random items that reach 90 % of the features on average
    sizes: NDArray[np.int64]
    coverage: NDArray[np.float64]  # c_n at `sizes`
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

    With m_f the number of items that fire feature f,

        sum_n E |F(S)| = (N + 1) sum_f m_f / (m_f + 1)

    so that AUC = (N + 1) / N times the mean of m / (m + 1) over the features, between (N + 1) / 2N and 1: R-hat is
    N / |F(D)| up to a factor of two, and benchmarks of different sizes are compared at `matched_size`.

    Args:
        matched_size: n of the size-matched R-hat, (sum_{j<=n} E |F(S_j)|) / (E |F(S_n)|)^2; default half the items.
        repeats: Number of random orders behind `sampled`; 0 leaves it out.
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
        coverage=expected_features(counts, items, sizes) / features.features,
        sampled=_sample_coverage(features, sizes, repeats, seed) if repeats else None,
    )


def curve_sizes(items: int) -> NDArray[np.int64]:
    """Subset sizes from 1 to N, dense where the curve bends; all of them where there are few."""
    even = np.linspace(1, items, CURVE_POINTS // 2)
    return np.unique(np.rint(np.concatenate([even, np.geomspace(1, items, CURVE_POINTS // 2)])).astype(np.int64))


def presence(counts: ArrayLike, items: int, size: int) -> NDArray[np.float64]:
    """Probability `[features]` that a random subset of `size` of the `items` fires a feature: 1 - q(N, m, n)."""
    fired = _checked(counts, items, size)
    return 1.0 - _choose_ratio(items - fired, size, items, size)


def expected_features(counts: ArrayLike, items: int, sizes: ArrayLike) -> NDArray[np.float64]:
    """E |F(S)| `[sizes]` over all subsets of each size (the numerator of Eq. 7)."""
    spectrum, features = np.unique(_checked(counts, items, 0), return_counts=True)
    return np.array([features @ presence(spectrum, items, int(size)) for size in np.atleast_1d(np.asarray(sizes))])


def presence_over_sizes(counts: ArrayLike, items: int, size: int | None = None) -> NDArray[np.float64]:
    """sum_{n=1}^{size} of `presence(counts, items, n)`, `[features]`; by default over all sizes. Over all sizes it is m
    (N + 1) / (m + 1), since C(N - m, N + 1) = 0."""
    last = items if size is None else size
    fired = _checked(counts, items, last)
    missed = (items + 1) / (fired + 1) * (1.0 - _choose_ratio(items - fired, last + 1, items + 1, last + 1))
    return last + 1 - missed


def jackknife_interval(
    estimate: float, parts: Sequence[LeftOut], level: float = 0.95, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> Interval:
    """Return `estimate` with t limits from the jackknife, cut at the bounds of the statistic.

    It is about new benchmarks of the same sizes with items drawn like these; about these very items nothing is
    uncertain. Where a single unit decides whether there is a value at all, the limits are the bounds.
    """
    if not 0 < level < 1:
        raise UserValueError(f"level must lie between 0 and 1, e.g. 0.95; got {level}.")
    error, units = standard_error(parts)
    if units < 2 or not np.isfinite(error):
        return Interval(estimate, *bounds)
    reach = float(student_t.ppf((1 + level) / 2, units - 1)) * error
    return Interval(estimate, max(estimate - reach, bounds[0]), min(estimate + reach, bounds[1]))


def standard_error(parts: Sequence[LeftOut]) -> tuple[float, int]:
    """(square root of the jackknife variance, number of different units).

    Each part belongs to one independent benchmark. Items of one unit, in one part or in several (an item that two
    benchmarks share, a translation), are one observation: their deviations are added before they are squared.
    """
    if not parts or any(len(values) == 0 for values, _ in parts):
        raise UserValueError("an interval needs at least one item in every benchmark.")
    deviations = np.concatenate([values - values.mean() for values, _ in parts])
    units, place = np.unique(np.concatenate([unit for _, unit in parts]), return_inverse=True)
    together = np.bincount(place, weights=deviations, minlength=len(units))
    return float(np.sqrt(np.square(together).sum())), len(units)


def divide(above: Any, below: Any) -> Any:
    """Quotient, NaN for 0 / 0: a ratio of sets of which one item holds all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(above, below)


def without_one(counts: NDArray[np.int64], items: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts after one item is left out: (if it does not fire the feature, if it does), both [width]."""
    return counts.clip(max=items - 1), (counts - 1).clip(min=0)


def _sample_coverage(features: ItemFeatures, sizes: NDArray[np.int64], repeats: int, seed: int) -> SampledCurve:
    """Coverage along random orders. A feature is reached at the first item that fires it: one minimum per entry."""
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
    size, after = min(size, items - 1), without_one(counts, items)
    reached, area = (
        features.leave_one_out(*(measure(count, items - 1, size) for count in after))
        for measure in (presence, presence_over_sizes)
    )
    parts = [(divide(area, reached**2), features.units)]
    return jackknife_interval(float(estimate), parts, level, (0.0, math.inf))


def _area(features: ItemFeatures, level: float) -> Interval:
    items, counts = len(features), features.counts
    fires = counts > 0
    estimate = (items + 1) / items * float((counts[fires] / (counts[fires] + 1)).mean())
    kept, fewer = without_one(counts, items)
    total = features.leave_one_out(kept / (kept + 1), fewer / (fewer + 1))
    alive = features.leave_one_out(kept > 0, fewer > 0)
    left_out = items / (items - 1) * divide(total, alive)
    return jackknife_interval(estimate, [(left_out, features.units)], level, ((items + 1) / (2 * items), 1.0))


def _items_for(share: float, features: ItemFeatures) -> int:
    """Smallest n with c_n >= share, by bisection: c_n rises with n."""
    low, high = 0, len(features)
    while high - low > 1:
        middle = (low + high) // 2
        covered = expected_features(features.counts, len(features), [middle])[0]
        low, high = (low, middle) if covered >= share * features.features else (middle, high)
    return high


def _choose_ratio(top: NDArray[np.int64], chosen: int, bottom: int, chosen_below: int) -> NDArray[np.float64]:
    """C(top, chosen) / C(bottom, chosen_below), 0 where top < chosen."""
    possible = top >= chosen
    left = np.where(possible, top - chosen, 0)
    logarithm = gammaln(top + 1.0) - gammaln(left + 1.0) - gammaln(bottom + 1.0) + gammaln(bottom - chosen_below + 1.0)
    return np.where(possible, np.exp(logarithm), 0.0)


def _checked(counts: ArrayLike, items: int, size: int) -> NDArray[np.int64]:
    fired = np.asarray(counts, dtype=np.int64)
    if fired.size and (fired.min() < 0 or fired.max() > items):
        raise UserValueError(f"a feature fires on 0 to {items} items, got counts from {fired.min()} to {fired.max()}.")
    if not 0 <= size <= items:
        raise UserValueError(f"a subset of {items} items has 0 to {items} of them, got {size}.")
    return fired
