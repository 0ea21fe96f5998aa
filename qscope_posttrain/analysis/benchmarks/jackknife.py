"""Intervals for what is counted over sets of items, from leaving out one item at a time.

The bootstrap is wrong here: a resample of N items holds about 0.63 N different ones, and a union of sets does not grow
by an item that it has, so every resampled union is too small and the interval may not even hold the estimate. Leaving
items out repeats none. Efron and Stein (1981): for independent items, sum_i (T_-i - mean T_-i)^2 is on average at least
the variance of the statistic on one item fewer, for ANY statistic. So these intervals err on the wide side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval

LeftOut = tuple[NDArray[np.float64], NDArray[np.int64]]
"""(statistic without each item of one benchmark [N], the unit of each item [N])"""


def divide(above: Any, below: Any) -> Any:
    """The quotient, NaN for 0 / 0: a ratio of sets of which one item holds all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(above, below)


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


def jackknife_interval(
    estimate: float,
    parts: Sequence[LeftOut],
    level: float = 0.95,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Interval:
    """`estimate` with t limits from the jackknife, cut at the bounds that the statistic has.

    It speaks of new benchmarks of the same sizes, their items drawn like these; about these very items nothing is
    uncertain. Where a single unit decides whether there is a value at all, the limits are the bounds.
    """
    if not 0 < level < 1:
        raise UserValueError(f"level must lie between 0 and 1, e.g. 0.95; got {level}.")
    error, units = standard_error(parts)
    if units < 2 or not np.isfinite(error):
        return Interval(estimate, *bounds)
    reach = float(student_t.ppf((1 + level) / 2, units - 1)) * error
    return Interval(estimate, max(estimate - reach, bounds[0]), min(estimate + reach, bounds[1]))
