"""Test whether features and performance agree on which benchmarks are redundant and alike, with size as the control.

Tests and intervals resample BENCHMARKS, since the pairs of benchmarks are far from independent: a permutation relabels
the benchmarks of one side (Mantel 1967), the bootstrap draws benchmarks and takes the pairs of different ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from qscope_posttrain.analysis.benchmarks.overlap import OverlapMatrix
from qscope_posttrain.analysis.benchmarks.performance import PerformanceRedundancy, ScoreTable, partial_correlation
from qscope_posttrain.analysis.benchmarks.redundancy import Redundancy
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval

Kind = Literal["pearson", "spearman"]

MIN_BENCHMARKS = 4
_ROUNDING = 1e-12
_ORDERS_AT_ONCE = 500


@dataclass(frozen=True)
class Correlation:
    """A coefficient with its test over benchmarks."""

    kind: Kind
    value: float
    low: float
    high: float  # Percentile bootstrap over benchmarks. Too narrow for few of them: under ten or so, read the p value.
    p: float  # Two-sided, by permutation of benchmarks: of all of them where there are no more than `permutations`
    benchmarks: int
    points: int  # Number of benchmarks, or of pairs of them


@dataclass(frozen=True)
class Agreement:
    """Correlation of a number from features, or from sizes, with one from performance."""

    predictor: str
    target: str
    correlation: Correlation


def redundancy_agreement(
    features: Sequence[Redundancy], performance: Mapping[str, PerformanceRedundancy], *, seed: int = 0
) -> tuple[list[Agreement], float]:
    """Spearman over benchmarks of R with R-hat, with the size-matched R-hat, and with N alone; and the partial rank
    correlation of R and R-hat given N (Eq. 12 on ranks)."""
    both = [found for found in features if found.name in performance]
    if len(both) < MIN_BENCHMARKS:
        raise UserValueError(f"R and R-hat need {MIN_BENCHMARKS} benchmarks with both, got {len(both)}.")
    r = [performance[found.name].r for found in both]
    r_hat = [found.r_hat.estimate for found in both]
    items = [float(found.items) for found in both]
    matched = [found.r_hat_matched.estimate for found in both]
    predictors = {"R-hat": r_hat, "R-hat, size-matched": matched, "N alone (control)": items}
    lines = [Agreement(name, "R", correlate(values, r, "spearman", seed=seed)) for name, values in predictors.items()]
    lines.append(Agreement("N alone (control)", "R-hat", correlate(items, r_hat, "spearman", seed=seed)))
    given_size = partial_correlation(spearman(r, r_hat), spearman(r, items), spearman(r_hat, items))
    return lines, float(given_size)


def similarity_agreement(
    overlap: OverlapMatrix,
    sizes: Mapping[str, int],
    scores: ScoreTable,
    control: str | None = None,
    *,
    seed: int = 0,
) -> list[Agreement]:
    """Pearson and Spearman over pairs: overlap_min with the similarity of scores, direct and given a control.

    Beside it the size-matched overlap_min, and as the control the ratio of the smaller to the larger size. Benchmarks
    without scores, and the control itself in the partial lines, are left out.
    """
    lines: list[Agreement] = []
    for partialled in [None] if control is None else [None, control]:
        names = [name for name in overlap.names if name in scores.benchmarks and name != partialled]
        if len(names) < MIN_BENCHMARKS:
            raise UserValueError(f"similarity needs {MIN_BENCHMARKS} benchmarks with scores, got {len(names)}.")
        chosen = np.ix_(*[[overlap.names.index(name) for name in names]] * 2)
        performance = scores.similarity(names, partialled)
        counts = np.asarray([sizes[name] for name in names], dtype=np.float64)
        target = "performance" if partialled is None else f"performance given {partialled}"
        predictors = {
            "overlap_min": overlap.values("overlap_min")[chosen],
            "overlap_min, size-matched": overlap.values("overlap_min", matched=True)[chosen],
            "ratio of sizes (control)": np.minimum.outer(counts, counts) / np.maximum.outer(counts, counts),
        }
        for name, values in predictors.items():
            lines += [
                Agreement(name, target, correlate(values, performance, kind, seed=seed)) for kind in get_args(Kind)
            ]
    return lines


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r; NaN where a side is constant."""
    a, b = (np.asarray(side, dtype=np.float64) for side in (x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else math.nan


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r of the ranks, ties sharing their mean rank."""
    return pearson(rankdata(x), rankdata(y))


def correlate(
    x: ArrayLike, y: ArrayLike, kind: Kind, *, resamples: int = 1000, permutations: int = 10_000, seed: int = 0
) -> Correlation:
    """Correlate two numbers per benchmark `[B]`, or two symmetric matrices `[B, B]` over the pairs of benchmarks."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    count = len(a)
    if a.shape not in ((count,), (count, count)) or b.shape != a.shape:
        raise UserValueError(f"expected two arrays of one shape, [B] or [B, B], got {a.shape} and {b.shape}.")
    if count < MIN_BENCHMARKS:
        raise UserValueError(f"a correlation over benchmarks needs at least {MIN_BENCHMARKS} of them, got {count}.")
    paired = a.ndim == 2
    rows, columns = np.triu_indices(count, 1)
    place = np.zeros((count, count), dtype=np.int64)  # of a pair among those above the diagonal
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    sides = (a[rows, columns], b[rows, columns]) if paired else (a, b)
    if not all(np.isfinite(side).all() for side in sides):
        raise UserValueError("correlations need finite numbers for every benchmark.")
    coefficient = pearson if kind == "pearson" else spearman
    value = coefficient(*sides)
    generator = np.random.default_rng(seed)
    extra = math.factorial(count) > permutations  # otherwise the observed order is among them
    if extra:
        orders = np.array([generator.permutation(count) for _ in range(permutations)])
    else:
        orders = np.array(list(itertools.permutations(range(count))))
    # A relabeling moves values and does not change them: ranks are moved along.
    first, second = (side - side.mean() for side in (sides if kind == "pearson" else map(rankdata, sides)))
    limit = math.sqrt(float(first @ first) * float(second @ second)) * (abs(value) - _ROUNDING)
    as_far = 0
    for part in np.array_split(orders, max(1, len(orders) // _ORDERS_AT_ONCE)):
        relabeled = second[place[part[:, rows], part[:, columns]] if paired else part]
        as_far += int(np.count_nonzero(np.abs(relabeled @ first) >= limit))
    p = (as_far + extra) / (len(orders) + extra) if math.isfinite(value) else math.nan
    drawn = []
    for draw in generator.integers(count, size=(resamples, count)):
        if len(set(draw.tolist())) > 2:  # two benchmarks correlate perfectly
            pairs = draw[rows] != draw[columns]
            chosen = (draw[rows][pairs], draw[columns][pairs]) if paired else draw
            drawn.append(coefficient(a[chosen], b[chosen]))
    known = np.array(drawn)[np.isfinite(drawn)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return Correlation(kind, value, float(low), float(high), p, count, len(sides[0]))


def fisher_interval(r: float, observations: int, level: float = 0.95) -> Interval:
    """Interval of a Pearson correlation of independent observations, by Fisher's z; all of [-1, 1] under four."""
    if observations < 4:
        return Interval(r, -1.0, 1.0)
    if not abs(r) < 1:
        return Interval(r, r, r)
    reach = NormalDist().inv_cdf((1 + level) / 2) / math.sqrt(observations - 3)
    return Interval(r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach))
