"""Confidence intervals for rates measured by sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qscope_posttrain.errors import UserValueError

_CELLS_AT_ONCE = 4_000_000  # Entries of the index matrix held at a time while resampling: 32 MB


class Interval(NamedTuple):
    """An estimate and its confidence limits, all in the unit of the estimate."""

    estimate: float
    low: float
    high: float

    def text(self, form: str = ".3f") -> str:
        """The estimate and its limits, each in this format: "0.500 [0.400, 0.600]"."""
        return f"{self.estimate:{form}} [{self.low:{form}}, {self.high:{form}}]"


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a binomial rate; right also at 0 and `n` successes, where the normal interval is empty.

    With p = successes / n and z the normal quantile of (1 + level) / 2 (Wilson 1927):

        (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    The n outcomes must be independent. Several samples of one prompt are not: see `bootstrap_over_prompts`.
    """
    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise UserValueError(f"Expected 0 <= successes <= n and n >= 1; got {successes} of {n}.")
    rate = successes / n
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    center = (rate + z2 / (2 * n)) / (1 + z2 / n)
    reach = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the limit is exact; rounding would leave it at 1e-18.
    return Interval(rate, 0.0 if successes == 0 else center - reach, 1.0 if successes == n else center + reach)


def rate_difference(first: tuple[int, int], second: tuple[int, int], level: float = 0.95) -> Interval:
    """Interval of p1 - p2 for two independent rates, each given as (successes, n): Newcombe 1998, method 10."""
    return hybrid_difference(wilson(*first, level), wilson(*second, level))


def hybrid_difference(one: Interval, two: Interval) -> Interval:
    """Newcombe's hybrid interval of p1 - p2 from the limits l and u of two independent estimates: from
    p1 - p2 - sqrt((p1 - l1)^2 + (u2 - p2)^2) to p1 - p2 + sqrt((u1 - p1)^2 + (p2 - l2)^2)."""
    difference = one.estimate - two.estimate
    below = math.hypot(one.estimate - one.low, two.high - two.estimate)
    above = math.hypot(one.high - one.estimate, two.estimate - two.low)
    return Interval(difference, difference - below, difference + above)


def bootstrap_over_prompts(
    outcomes: ArrayLike | Sequence[ArrayLike], resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a mean, resampling whole prompts: samples of one prompt stay together.

    The width is 0 where all prompts agree: then the data hold no information on the spread between prompts, and the
    Wilson interval is the one to read. `outcomes` are `[prompts, samples]`, or a list of such matrices, one per stratum
    (e.g. language): each is resampled by itself, and the estimate is the unweighted mean of their means.
    """
    is_strata = isinstance(outcomes, (list, tuple)) and bool(outcomes) and np.ndim(outcomes[0]) == 2
    strata: list[Any] = list(outcomes) if is_strata else [outcomes]  # type: ignore[arg-type]
    return _percentile_interval([_prompt_means(stratum) for stratum in strata], resamples, level, seed)


def bootstrap_difference(
    first: ArrayLike, second: ArrayLike, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Paired bootstrap interval of mean(first) - mean(second), both `[prompts, samples]`: row n of both, of one prompt,
    is resampled together, so that what makes a prompt easy or hard cancels. See `bootstrap_over_prompts`."""
    first_means, second_means = _prompt_means(first), _prompt_means(second)
    if len(first_means) != len(second_means):
        raise UserValueError(
            f"A paired difference needs the same prompts; got {len(first_means)} and {len(second_means)}."
        )
    return _percentile_interval([first_means - second_means], resamples, level, seed)


def bootstrap_of_sums(
    rows: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic of column sums, such as a ratio, resampling whole rows. `statistic`
    maps column sums `[..., columns]` to values `[...]`. See `bootstrap_over_prompts`."""
    matrix = np.asarray(rows, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise UserValueError(f"Expected sums as [rows, columns], not empty; got the shape {list(matrix.shape)}.")
    generator, count = np.random.default_rng(seed), len(matrix)
    draws = _in_pieces(
        lambda size: generator.multinomial(count, np.full(count, 1 / count), size=size) @ matrix, resamples, count
    )
    return _between_quantiles(float(statistic(matrix.sum(axis=0))), statistic(draws), level)


def seed_noise(outcomes: ArrayLike) -> float:
    """Half width of the 95 % range of the difference between the means of two runs with different seeds.

    1.96 sqrt(2) times the standard error of the mean of `outcomes` `[prompts, samples]` (0 or 1) over seeds, the
    prompts being fixed. The variance of one prompt's responses is estimated by the unbiased p (1 - p) s / (s - 1) from
    its s samples. With a single sample it is unknown, and p (1 - p) over all prompts, on average not less, is taken.
    """
    matrix = np.asarray(outcomes, dtype=np.float64)
    prompts, samples = matrix.shape
    if samples > 1:
        rates = matrix.mean(axis=1)
        variance = float((rates * (1 - rates)).mean()) * samples / (samples - 1)
    else:
        variance = float(matrix.mean() * (1 - matrix.mean()))
    return 1.96 * math.sqrt(2 * variance / (prompts * samples))


def _percentile_interval(strata: list[NDArray[np.float64]], resamples: int, level: float, seed: int) -> Interval:
    """Interval of the mean of the strata's means of per-prompt values `[prompts]`."""
    generator = np.random.default_rng(seed)

    def means(values: NDArray[np.float64]) -> NDArray[np.float64]:
        count = len(values)
        return _in_pieces(
            lambda size: values[generator.integers(count, size=(size, count))].mean(axis=1), resamples, count
        )

    replicates = np.mean([means(values) for values in strata], axis=0)
    return _between_quantiles(float(np.mean([values.mean() for values in strata])), replicates, level)


def _in_pieces(draw: Callable[[int], NDArray[np.float64]], resamples: int, count: int) -> NDArray[np.float64]:
    """`draw(size)` for pieces of `resamples`, each of `count` entries, that fit into memory."""
    if resamples < 1:
        raise UserValueError(f"resamples must be at least 1; got {resamples}.")
    step = max(1, _CELLS_AT_ONCE // count)
    return np.concatenate([draw(min(step, resamples - start)) for start in range(0, resamples, step)])


def _between_quantiles(estimate: float, replicates: NDArray[np.float64], level: float) -> Interval:
    _check_level(level)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def _prompt_means(outcomes: ArrayLike) -> NDArray[np.float64]:
    """Mean outcome of each prompt `[prompts]`."""
    matrix = np.asarray(outcomes, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise UserValueError(f"Expected outcomes as [prompts, samples], not empty; got the shape {list(matrix.shape)}.")
    if not np.isfinite(matrix).all():
        raise UserValueError("Outcomes must be finite numbers.")
    return matrix.mean(axis=1)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UserValueError(f"level must lie between 0 and 1, e.g. 0.95; got {level}.")
