"""Weights of the arms, chosen on validation prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.experiments.equal_cost import CurvePoint, cost_curve
from benchmarks.experiments.switching_rows import Compared, by_arm

BUDGET = 1.0
"""Largest mean rise of (masked) perplexity over SFT, per cent."""
_FOLLOWERS = {"random_features": "sasft_decoder"}


@dataclass(frozen=True)
class Choice:
    """The weight of an arm, and what it gave on validation prompts."""

    weight: float
    cost: float
    """Mean over runs, per cent."""
    effect: float
    """Mean change of the hazard over runs, per cent."""
    affordable: bool
    """Whether the cost is within the budget; if not, this is the cheapest weight, or that of the arm it controls."""


def choose_weights(pairs: Iterable[Compared], budget: float = BUDGET) -> dict[str, Choice]:
    """Choose a weight for each arm of one cell.

    The one with the lowest mean hazard relative to SFT on validation prompts among those whose mean cost there is at
    most `budget`; the cheapest if all cost more. Random features take the weight of the decoder readout that they
    control, where they were run at that weight.

    Args:
        pairs: runs of one cell, each beside SFT.
        budget: per cent.
    """
    curves = {arm: cost_curve(runs, "hazard", "val") for arm, runs in by_arm(pairs).items()}
    chosen = {arm: _choose(curve, budget) for arm, curve in curves.items()}
    for follower, leader in _FOLLOWERS.items():
        if follower in chosen and leader in chosen:
            same = [point for point in curves[follower] if point.weight == chosen[leader].weight]
            chosen[follower] = _choice(same[0], budget) if same else chosen[follower]
    return chosen


def _choose(curve: list[CurvePoint], budget: float) -> Choice:
    affordable = [point for point in curve if point.cost.estimate <= budget]
    if affordable:
        return _choice(min(affordable, key=lambda point: point.effect.estimate), budget)
    return _choice(min(curve, key=lambda point: point.cost.estimate), budget)


def _choice(point: CurvePoint, budget: float) -> Choice:
    return Choice(point.weight, point.cost.estimate, point.effect.estimate, point.cost.estimate <= budget)
