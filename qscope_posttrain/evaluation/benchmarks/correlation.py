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
from scipy.stats import rankdata

from qscope_posttrain.intervals import Interval

Kind = Literal["pearson", "spearman"]
Vector = NDArray[np.float64]

FEWEST_BENCHMARKS = 4
_ROUNDING = 1e-12


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
    return pearson(rankdata(x), rankdata(y))


def partial_correlation(xy: ArrayLike, xm: ArrayLike, ym: ArrayLike) -> Vector:
    """Eq. 12: (r_xy - r_xm r_ym) / sqrt((1 - r_xm^2) (1 - r_ym^2)); NaN where a side is the control itself."""
    xy, xm, ym = (np.asarray(side, dtype=np.float64) for side in (xy, xm, ym))
    square = (1 - xm**2) * (1 - ym**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(square > _ROUNDING, (xy - xm * ym) / np.sqrt(np.maximum(square, 0)), np.nan)


def correlate(
    x: ArrayLike, y: ArrayLike, kind: Kind, *, resamples: int = 2000, permutations: int = 10_000, seed: int = 0
) -> Correlation:
    """Correlation of two numbers of each benchmark `[B]`."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    _check(a, b, 1)
    return _correlation(kind, len(a), len(a), lambda order: (a, b[order]), lambda draw: (a[draw], b[draw]),
                        resamples, permutations, seed)  # fmt: skip


def correlate_pairs(
    x: ArrayLike, y: ArrayLike, kind: Kind, *, resamples: int = 2000, permutations: int = 10_000, seed: int = 0
) -> Correlation:
    """Correlation of two symmetric matrices `[B, B]` over their pairs above the diagonal."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    _check(a, b, 2)
    rows, columns = np.triu_indices(len(a), 1)

    def relabelled(order: NDArray[np.int64]) -> tuple[Vector, Vector]:
        return a[rows, columns], b[order[rows], order[columns]]

    def redrawn(draw: NDArray[np.int64]) -> tuple[Vector, Vector]:
        first, second = draw[rows], draw[columns]
        different = first != second
        return a[first, second][different], b[first, second][different]

    return _correlation(kind, len(a), len(rows), relabelled, redrawn, resamples, permutations, seed)


def _correlation(
    kind: Kind,
    benchmarks: int,
    points: int,
    relabelled: Callable[[NDArray[np.int64]], tuple[Vector, Vector]],
    redrawn: Callable[[NDArray[np.int64]], tuple[Vector, Vector]],
    resamples: int,
    permutations: int,
    seed: int,
) -> Correlation:
    coefficient = pearson if kind == "pearson" else spearman
    value = coefficient(*relabelled(np.arange(benchmarks)))
    generator = np.random.default_rng(seed)
    if math.factorial(benchmarks) <= permutations:
        chance = [coefficient(*relabelled(np.array(o))) for o in itertools.permutations(range(benchmarks))]
        extra = 0  # the observed order is among them
    else:
        chance = [coefficient(*relabelled(generator.permutation(benchmarks))) for _ in range(permutations)]
        extra = 1
    as_far = np.count_nonzero(np.abs(chance) >= abs(value) - _ROUNDING)
    drawn = []
    for _ in range(resamples):
        draw = generator.integers(benchmarks, size=benchmarks)
        if len(set(draw.tolist())) > 2:  # two benchmarks correlate perfectly
            drawn.append(coefficient(*redrawn(draw)))
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if not np.all(np.isnan(drawn)) else (math.nan, math.nan)
    p = (as_far + extra) / (len(chance) + extra) if math.isfinite(value) else math.nan
    return Correlation(kind, value, float(low), float(high), p, benchmarks, points)


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
        raise ValueError(f"expected two arrays of one {dimensions}-dimensional shape, got {a.shape} and {b.shape}.")
    if len(a) < FEWEST_BENCHMARKS:
        raise ValueError(f"a correlation over benchmarks needs at least {FEWEST_BENCHMARKS} of them, got {len(a)}.")
    checked = (a[np.triu_indices(len(a), 1)], b[np.triu_indices(len(b), 1)]) if dimensions == 2 else (a, b)
    if not all(np.isfinite(side).all() for side in checked):
        raise ValueError("correlations need finite numbers for every benchmark.")
