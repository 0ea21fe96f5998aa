"""Correlations over benchmarks and over pairs of them, with tests and intervals that resample BENCHMARKS.

The B (B - 1) / 2 pairs of B benchmarks share benchmarks, so they are far from independent: a test that took the pairs
for a sample would see precision that is not there. A permutation relabels the benchmarks of one side (Mantel 1967), the
bootstrap draws benchmarks and takes the pairs of different ones among them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval

Kind = Literal["pearson", "spearman"]
Vector = NDArray[np.float64]
Orders = NDArray[np.int64]

FEWEST_BENCHMARKS = 4
_ROUNDING = 1e-12
_ORDERS_AT_ONCE = 500


@dataclass(frozen=True)
class Correlation:
    """A coefficient with its test over benchmarks."""

    kind: Kind
    value: float
    low: float
    high: float
    """Percentile bootstrap over benchmarks. Too narrow for few of them: under ten or so, read the p value."""
    p: float
    """Two-sided, by permutation of benchmarks: of all of them where there are no more than `permutations`"""
    benchmarks: int
    points: int
    """Benchmarks, or pairs of them"""


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r; NaN where a side is constant."""
    a, b = (np.asarray(side, dtype=np.float64) for side in (x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else math.nan


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r of the ranks, ties sharing their mean rank."""
    return pearson(ranks(x), ranks(y))


def ranks(x: ArrayLike) -> Vector:
    """Ranks from 1, ties sharing their mean; many times faster than scipy's on the short rows of a bootstrap."""
    _, place, counts = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def partial_correlation(xy: ArrayLike, xm: ArrayLike, ym: ArrayLike) -> Vector:
    """Eq. 12: (r_xy - r_xm r_ym) / sqrt((1 - r_xm^2) (1 - r_ym^2)); NaN where a side is the control itself."""
    xy, xm, ym = (np.asarray(side, dtype=np.float64) for side in (xy, xm, ym))
    square = (1 - xm**2) * (1 - ym**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(square > _ROUNDING, (xy - xm * ym) / np.sqrt(np.maximum(square, 0)), np.nan)


def correlate(
    x: ArrayLike, y: ArrayLike, kind: Kind, *, resamples: int = 1000, permutations: int = 10_000, seed: int = 0
) -> Correlation:
    """Correlation of two numbers of each benchmark `[B]`."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    _check(a, b, 1)

    def redrawn(draw: Orders) -> tuple[Vector, Vector]:
        return a[draw], b[draw]

    return _correlation(kind, a, b, lambda values, orders: values[orders], redrawn, resamples, permutations, seed)


def correlate_pairs(
    x: ArrayLike, y: ArrayLike, kind: Kind, *, resamples: int = 1000, permutations: int = 10_000, seed: int = 0
) -> Correlation:
    """Correlation of two symmetric matrices `[B, B]` over their pairs above the diagonal."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    _check(a, b, 2)
    rows, columns = np.triu_indices(len(a), 1)
    place = np.zeros(a.shape, dtype=np.int64)  # of a pair among those above the diagonal
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))

    def relabelled(values: Vector, orders: Orders) -> Vector:
        return values[place[orders[:, rows], orders[:, columns]]]

    def redrawn(draw: Orders) -> tuple[Vector, Vector]:
        first, second = draw[rows], draw[columns]
        different = first != second
        return a[first, second][different], b[first, second][different]

    pairs = a[rows, columns], b[rows, columns]
    return _correlation(kind, *pairs, relabelled, redrawn, resamples, permutations, seed, benchmarks=len(a))


def _correlation(
    kind: Kind,
    x: Vector,
    y: Vector,
    relabelled: Callable[[Vector, Orders], Vector],
    redrawn: Callable[[Orders], tuple[Vector, Vector]],
    resamples: int,
    permutations: int,
    seed: int,
    benchmarks: int | None = None,
) -> Correlation:
    """`relabelled` gives the values of one side under each of some orders `[orders, B]`, `redrawn` both sides of a draw
    of benchmarks with replacement."""
    count = len(x) if benchmarks is None else benchmarks
    coefficient = pearson if kind == "pearson" else spearman
    value = coefficient(x, y)
    generator = np.random.default_rng(seed)
    if math.factorial(count) <= permutations:
        orders = np.array(list(itertools.permutations(range(count))))
        extra = 0  # the observed order is among them
    else:
        orders = np.array([generator.permutation(count) for _ in range(permutations)])
        extra = 1
    # A relabelling moves values and does not change them: ranks are moved along.
    sides = (x, y) if kind == "pearson" else (ranks(x), ranks(y))
    first, second = (side - side.mean() for side in sides)
    scale = math.sqrt(float(first @ first) * float(second @ second))
    as_far = 0
    for part in np.array_split(orders, max(1, len(orders) // _ORDERS_AT_ONCE)):
        as_far += int(np.count_nonzero(np.abs(relabelled(second, part) @ first) >= scale * (abs(value) - _ROUNDING)))
    p = (as_far + extra) / (len(orders) + extra) if math.isfinite(value) else math.nan
    drawn = []
    for draw in generator.integers(count, size=(resamples, count)):
        if len(set(draw.tolist())) > 2:  # two benchmarks correlate perfectly
            drawn.append(coefficient(*redrawn(draw)))
    known = np.array(drawn)[np.isfinite(drawn)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return Correlation(kind, value, float(low), float(high), p, count, len(x))


def fisher_interval(r: float, observations: int, level: float = 0.95) -> Interval:
    """Interval of a Pearson correlation of independent observations, by Fisher's z; all of [-1, 1] under four."""
    from statistics import NormalDist

    if observations < 4 or not abs(r) < 1:
        return Interval(r, -1.0 if observations < 4 else r, 1.0 if observations < 4 else r)
    reach = NormalDist().inv_cdf((1 + level) / 2) / math.sqrt(observations - 3)
    return Interval(r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach))


def _check(a: Vector, b: Vector, dimensions: int) -> None:
    shape = (len(a),) * dimensions
    if a.shape != shape or b.shape != shape:
        raise UserValueError(f"expected two arrays of one {dimensions}-dimensional shape, got {a.shape} and {b.shape}.")
    if len(a) < FEWEST_BENCHMARKS:
        raise UserValueError(f"a correlation over benchmarks needs at least {FEWEST_BENCHMARKS} of them, got {len(a)}.")
    checked = (a[np.triu_indices(len(a), 1)], b[np.triu_indices(len(b), 1)]) if dimensions == 2 else (a, b)
    if not all(np.isfinite(side).all() for side in checked):
        raise UserValueError("correlations need finite numbers for every benchmark.")
