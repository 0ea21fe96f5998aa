"""Arms at equal cost: their effect on switching at a given cost in perplexity, and their differences.

Arms have coefficients of different units, so comparing them at any one coefficient compares how strong they were
chosen. Here the curve of each run of effect against cost, over coefficients, is read off at a budget of perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.experiments.clustered import ClusteredInterval, clustered_interval
from benchmarks.experiments.grouping import by_base
from benchmarks.experiments.switching_rows import Compared, Measure, Split
from qscope_posttrain.errors import UserValueError

BUDGETS = (0.5, 1.0)
"""Rises of (masked) perplexity over SFT, per cent."""


@dataclass(frozen=True)
class CurvePoint:
    """An arm at one weight: means over runs, both against SFT in per cent."""

    weight: float
    cost: ClusteredInterval
    effect: ClusteredInterval


@dataclass(frozen=True)
class RunAtCost:
    """One base and seed of an arm, read off its curve at a budget."""

    effect: float
    """Change of switching against SFT, per cent."""
    capped: bool
    """Whether no weight costs as much as the budget, so that this is the effect of the strongest weight."""


@dataclass(frozen=True)
class ArmAtCost:
    """An arm at a budget, over its runs."""

    effect: ClusteredInterval
    """Per cent."""
    runs: Mapping[tuple[int, int], RunAtCost]
    """By (base, seed)."""

    @property
    def capped(self) -> int:
        """Runs that never reach the budget: the arm might do more there than `effect` says."""
        return sum(run.capped for run in self.runs.values())


def cost_curve(
    pairs: Iterable[Compared], measure: Measure = "hazard", split: Split = "test", level: float = 0.95
) -> list[CurvePoint]:
    """An arm's effect and cost at each weight, ascending, with intervals over bases.

    Args:
        pairs: runs of one arm in one cell.

    Raises:
        ValueError: `sampled` of runs without samples or on validation prompts.
    """
    weights: dict[float, list[Compared]] = {}
    for pair in pairs:
        weights.setdefault(pair.run.weight, []).append(pair)
    return [
        CurvePoint(
            weight,
            clustered_interval(by_base(runs, lambda pair: pair.cost(split)), level),
            clustered_interval(by_base(runs, lambda pair: pair.effect(measure, split)), level),
        )
        for weight, runs in sorted(weights.items())
    ]


def read_off(points: Sequence[tuple[float, float]], budget: float) -> tuple[float, bool]:
    """The log effect ratio at the cost `budget`, and whether the curve ends below that cost.

    The curve runs in straight lines from (0, 0), which is SFT, through `points`; the first place where its cost reaches
    the budget counts. Costs may be negative or fall again with the weight.

    Args:
        points: (cost, log effect ratio) in the order of the weights.
        budget: above 0.

    Returns:
        The interpolated log ratio, or the last point's where no point reaches the budget.

    Raises:
        ValueError: no point, or a budget that is not positive.
    """
    if not points or not budget > 0:
        raise UserValueError(
            f"expected at least one point and a budget above 0; got {len(points)} points and {budget}."
        )
    cost, value = 0.0, 0.0
    for next_cost, next_value in points:
        if next_cost >= budget:
            share = (budget - cost) / (next_cost - cost)
            return value + share * (next_value - value), False
        cost, value = next_cost, next_value
    return value, True


def arm_at_cost(
    pairs: Iterable[Compared], budget: float, measure: Measure = "hazard", split: Split = "test", level: float = 0.95
) -> ArmAtCost:
    """One arm at a budget: each (base, seed) read off its own curve, then an interval over bases of per cent changes.

    Args:
        pairs: runs of one arm in one cell.
        budget: rise of (masked) perplexity, per cent.

    Raises:
        ValueError: no runs, a budget that is not positive, or as for `cost_curve`.
    """
    grouped: dict[tuple[int, int], list[Compared]] = {}
    for pair in pairs:
        grouped.setdefault(pair.key, []).append(pair)
    runs: dict[tuple[int, int], RunAtCost] = {}
    for key, own in grouped.items():
        ordered = sorted(own, key=lambda pair: pair.run.weight)
        points = [(pair.cost(split), pair.log_ratio(measure, split)) for pair in ordered]
        value, capped = read_off(points, budget)
        runs[key] = RunAtCost(100 * math.expm1(value), capped)
    return ArmAtCost(clustered_interval(_by_base({key: run.effect for key, run in runs.items()}), level), runs)


def paired_difference(first: ArmAtCost, second: ArmAtCost, level: float = 0.95) -> ClusteredInterval:
    """Effect of `first` minus that of `second` in points of per cent, over the bases and seeds that both have.

    Negative: `first` leaves less switching at the same cost.

    Raises:
        ValueError: they share no (base, seed).
    """
    shared = [key for key in first.runs if key in second.runs]
    if not shared:
        raise UserValueError("a paired difference needs runs of the same base and seed; the arms share none.")
    return clustered_interval(
        _by_base({key: first.runs[key].effect - second.runs[key].effect for key in shared}), level
    )


def _by_base(values: Mapping[tuple[int, int], float]) -> dict[int, list[float]]:
    grouped: dict[int, list[float]] = {}
    for (base, _), value in values.items():
        grouped.setdefault(base, []).append(value)
    return grouped
