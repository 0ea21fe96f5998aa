"""Intervals over pretrained models: runs of one base model are not independent, the base models are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from scipy import stats

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval, wilson

FEWEST_BASES = 3
"""Base models from which on the interval is taken over their means."""


@dataclass(frozen=True)
class ClusteredInterval:
    """A mean over base models with a t interval, all in the unit of the values."""

    estimate: float
    low: float
    """NaN, as `high`, where a single value says nothing about the spread."""
    high: float
    unit: Literal["bases", "runs"]
    """The unit taken as independent. "runs": too few bases, so the interval leaves out how bases differ."""
    count: int
    """How many of them."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0; False where there is no interval."""
        return self.low > 0 or self.high < 0


def clustered_interval(values: Mapping[int, Sequence[float]], level: float = 0.95) -> ClusteredInterval:
    """Mean over base models of each base's mean over runs, with a t interval.

    With B >= 3 bases of means m_b the interval is mean(m_b) +- t_(B-1) sd(m_b) / sqrt(B). With fewer it is taken over
    all N runs, of n_b in base b, as if they were independent:

        mean(m_b)  +-  t_(N-1) sd(runs) sqrt(sum_b 1 / n_b) / B        (sd(runs) / sqrt(N) where all n_b are equal)

    Args:
        values: base model -> one value per run.
        level: coverage.

    Raises:
        ValueError: no base, a base without runs, values that are not finite, or `level` outside (0, 1).
    """
    if not 0 < level < 1:
        raise UserValueError(f"level must lie between 0 and 1, e.g. 0.95; got {level}.")
    if not values:
        raise UserValueError("an interval over bases needs the runs of at least one base; got none.")
    for base, runs in values.items():
        if not len(runs) or not all(math.isfinite(run) for run in runs):
            raise UserValueError(f"base {base} needs at least one run and finite values; got {list(runs)}.")
    means = [fmean(runs) for runs in values.values()]
    pooled = [run for runs in values.values() for run in runs]
    unit: Literal["bases", "runs"] = "bases" if len(means) >= FEWEST_BASES else "runs"
    sample = means if unit == "bases" else pooled
    estimate = fmean(means)
    if len(sample) == 1:
        return ClusteredInterval(estimate, math.nan, math.nan, unit, 1)
    share = 1 / len(means) if unit == "bases" else sum(1 / len(runs) for runs in values.values()) / len(means) ** 2
    reach = float(stats.t.ppf((1 + level) / 2, len(sample) - 1)) * stdev(sample) * math.sqrt(share)
    return ClusteredInterval(estimate, estimate - reach, estimate + reach, unit, len(sample))


def clustered_rate(counts: Mapping[int, Sequence[tuple[int, int]]], level: float = 0.95) -> Interval:
    """A rate over base models: `clustered_interval` of the runs' rates, kept within [0, 1].

    Where runs or bases do not differ at all (no case in any of them, say), or there is a single run, the spread says
    nothing: then the limits are Wilson's for all responses together, which takes these for independent.

    Args:
        counts: base model -> (cases, responses) of each run.
        level: coverage.

    Raises:
        ValueError: as for `clustered_interval`, or counts that are no rate.
    """
    outcomes = [outcome for runs in counts.values() for outcome in runs]
    pooled = wilson(sum(cases for cases, _ in outcomes), sum(responses for _, responses in outcomes), level)
    rates = {base: [cases / responses for cases, responses in runs] for base, runs in counts.items()}
    found = clustered_interval(rates, level)
    if math.isnan(found.low) or found.high - found.low < 1e-12:
        return Interval(found.estimate, pooled.low, pooled.high)
    return Interval(found.estimate, max(found.low, 0.0), min(found.high, 1.0))
