"""Rates of rare events over runs: what resampling runs says, and what so few events allow to say at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.experiments.clustered import FEWEST_BASES
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval

_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True)
class Count:
    """Events among the samples of one run."""

    base: int
    """The run's start checkpoint."""
    events: int
    samples: int


def pooled(counts: Sequence[Count]) -> tuple[int, int]:
    """Events and samples of all runs together.

    Raises:
        ValueError: no runs, or a run without samples.
    """
    if not counts or any(count.samples < 1 or not 0 <= count.events <= count.samples for count in counts):
        raise UserValueError(f"expected at least one run, each with 0 <= events <= samples; got {list(counts)}.")
    return sum(count.events for count in counts), sum(count.samples for count in counts)


def rate_over_runs(counts: Sequence[Count], level: float = 0.95) -> Interval | None:
    """The pooled rate with a percentile bootstrap interval over runs, see `resampled`.

    None where resampling cannot say anything: a single run, or no event in any. Read the Wilson interval there.
    """
    events, samples = pooled(counts)
    if len(counts) < 2 or events == 0:
        return None
    weights = resampled([count.base for count in counts])
    drawn, of = _weighted(weights, counts)
    low, high = np.quantile(drawn / of, [(1 - level) / 2, (1 + level) / 2])
    return Interval(events / samples, float(low), float(high))


def rate_ratio(counts: Sequence[Count], references: Sequence[Count], level: float = 0.95) -> Interval:
    """Ratio of two pooled rates, from runs in pairs (element i of both has the same start and seed).

    The limits are the outer ones of two intervals:

    - over runs: the percentile bootstrap (`resampled`, pairs stay together) of the ratio with half an event added to
      both counts. It knows how runs differ; where one arm has no event at all it knows too little.
    - of counts: the exact interval of two Poisson rates given their sum, k1 | k1 + k2 ~ Binomial(p), with
      ratio = p / (1 - p) * n2 / n1 and Clopper-Pearson limits of p. It takes samples as independent, but is right at a
      count of 0: then the ratio is 0 with an upper limit above it.

    The estimate is (k1 / n1) / (k2 / n2): 0 for k1 = 0, infinite for k2 = 0, and NaN where nothing happened at all.

    Raises:
        ValueError: runs that are not in pairs of one base, or see `pooled`.
    """
    if [count.base for count in counts] != [reference.base for reference in references]:
        raise UserValueError("a ratio needs runs in pairs: the same bases in the same order on both sides.")
    (k1, n1), (k2, n2) = pooled(counts), pooled(references)
    low, high = _exact_limits(k1, n1, k2, n2, level)
    if len(counts) > 1 and k1 + k2 > 0:
        weights = resampled([count.base for count in counts])
        (first, of_first), (second, of_second) = _weighted(weights, counts), _weighted(weights, references)
        ratios = ((first + 0.5) / of_first) / ((second + 0.5) / of_second)
        limits = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
        low, high = min(low, float(limits[0])), max(high, float(limits[1]))
    if k2 == 0:
        return Interval(math.nan if k1 == 0 else math.inf, low, high)
    return Interval((k1 / n1) / (k2 / n2), low, high)


def resampled(bases: Sequence[int]) -> NDArray[np.int64]:
    """How often each run is drawn in each resample: [resamples, runs].

    With at least 3 bases, bases are drawn with replacement and then, for each draw of a base, its runs. With fewer, the
    runs within each base are drawn, as drawing two bases out of two would say nothing: how bases differ is left out.
    """
    generator = np.random.default_rng(_SEED)
    names = list(dict.fromkeys(bases))
    places = [np.flatnonzero(np.asarray(bases) == name) for name in names]
    weights = np.zeros((_RESAMPLES, len(bases)), dtype=np.int64)
    draw_bases = len(names) >= FEWEST_BASES
    for slot in range(len(names)):
        drawn = generator.integers(len(names), size=_RESAMPLES) if draw_bases else np.full(_RESAMPLES, slot)
        for base, own in enumerate(places):
            lines = np.flatnonzero(drawn == base)
            shares = np.full(len(own), 1 / len(own))
            weights[np.ix_(lines, own)] += generator.multinomial(len(own), shares, size=len(lines))
    return weights


def _weighted(weights: NDArray[np.int64], counts: Sequence[Count]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Events and samples of every resample."""
    events, samples = (np.array(values, dtype=np.float64) for values in zip(*map(_pair, counts), strict=True))
    return weights @ events, weights @ samples


def _pair(count: Count) -> tuple[int, int]:
    return count.events, count.samples


def _exact_limits(k1: int, n1: int, k2: int, n2: int, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low = 0.0 if k1 == 0 else float(stats.beta.ppf(tail, k1, k2 + 1))
    high = 1.0 if k2 == 0 else float(stats.beta.ppf(1 - tail, k1 + 1, k2))
    return low / (1 - low) * n2 / n1, math.inf if high == 1.0 else high / (1 - high) * n2 / n1
