"""Which push makes a model loop by itself: features against random directions of equal length, and one choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qscope_posttrain.features.repetition_curve import (
    FEATURE,
    MEANS,
    RANDOM,
    UNSTEERED,
    CurvePoint,
    CurveSettings,
)
from qscope_posttrain.intervals import Interval, rate_difference
from qscope_posttrain.report.tables import Cell, Table

ONE_STANDARD_ERROR = 0.6827
SCAN, FRESH = "scan", "fresh"
CHOSEN = "*"


def margin(points: Sequence[CurvePoint], point: CurvePoint, level: float = 0.95) -> Interval:
    """Loop share of a point minus that of random directions at the same layer, strength and window (Newcombe).

    Raises:
        ValueError: `points` hold no such random point.
    """
    control = _control(points, RANDOM, point)
    if control is None:
        raise ValueError(f"No random directions were measured at layer, strength and window {point.setting}.")
    return rate_difference((point.looped, point.samples), (control.looped, control.samples), level)


def choose(points: Sequence[CurvePoint]) -> CurvePoint | None:
    """The point to steer with, by its margin over random directions and not by its loop share.

    Early layers loop after any push of sufficient length, so the share alone says nothing about the feature.

    1. Eligible are the feature points whose margin is above 0 with its whole 95 % interval; if there are none, all
       feature points at which something loops.
    2. The best is the one with the largest margin. In its reach are those whose margin is not below the best one's
       lower limit of one standard error: a scan cannot tell them apart.
    3. Of these, the one with the smallest share of unlikely tokens: a negative example close to the model's own text
       teaches about the loop and not about the text before it. Ties: the smaller strength, then the larger margin.

    None if no feature point has a loop.
    """
    looping = [point for point in points if point.trial.push.kind == FEATURE and point.looped > 0]
    if not looping:
        return None
    margins = {id(point): margin(points, point) for point in looping}
    eligible = [point for point in looping if margins[id(point)].low > 0] or looping
    best = max(eligible, key=lambda point: margins[id(point)].estimate)
    limit = margin(points, best, ONE_STANDARD_ERROR).low
    reach = [point for point in eligible if point is best or margins[id(point)].estimate >= limit]
    return min(reach, key=lambda p: (p.unlikely_share, p.trial.strength, -margins[id(p)].estimate))


@dataclass(frozen=True)
class SteeringCurve:
    """The scan, the point chosen from it, and the same point and its controls measured again."""

    scan: tuple[CurvePoint, ...]
    chosen: CurvePoint | None
    """None when no push along a feature made anything loop"""
    fresh: tuple[CurvePoint, ...]
    """The chosen point, random directions, difference of means and no steering, on other prompts and random numbers"""
    settings: CurveSettings

    @property
    def specific(self) -> bool:
        """Whether the chosen features loop more often than random directions on completions they were not chosen by."""
        return self.chosen is not None and margin(self.fresh, self._fresh(FEATURE)).low > 0

    def verdict(self) -> str:
        """One sentence on what was found."""
        if self.chosen is None:
            return "No push along these features made the model loop: nothing is chosen."
        point, control = self._fresh(FEATURE), self._fresh(RANDOM)
        push = point.trial.push
        where = f"{push.name} in layer {push.layer} at strength {point.trial.strength:g}"
        rates = f"{point.rate.estimate:.0%} of completions against {control.rate.estimate:.0%} with random directions"
        if self.specific:
            return f"Chosen: {where}, looping in {rates}."
        return (
            f"Not specific: {where} loops in {rates}, which is not clearly more. It is recorded with specific=false: "
            "do not train on it as a repetition feature."
        )

    def to_settings(self, label: str) -> dict[str, Any] | None:
        """`FeatureSet.settings["steering"]`: what is needed to steer, and what the final check gave; None if nothing.

        `looped`, `random`, `difference_of_means` and `unsteered` are shares of `samples` completions each.
        """
        if self.chosen is None:
            return None
        point = self._fresh(FEATURE)
        return {
            "label": label,
            "layer": point.trial.push.layer,
            "strength": point.trial.strength,
            "unit": "relative",
            "window_start": list(self.settings.window_start),
            "window_length": point.trial.window_length,
            "looped": point.rate.estimate,
            "random": self._fresh(RANDOM).rate.estimate,
            "difference_of_means": self._fresh(MEANS).rate.estimate,
            "unsteered": self._fresh(UNSTEERED).rate.estimate,
            "unlikely_tokens": point.unlikely_share,
            "samples": point.samples,
            "specific": self.specific,
        }

    def to_table(self) -> Table:
        """Every point, the final check at the end."""
        rows = [self._row(SCAN, self.scan, point) for point in self.scan]
        rows += [self._row(FRESH, self.fresh, point) for point in self.fresh]
        low, high = self.settings.window_start
        floor = self.settings.probability_floor
        return Table(
            title="Steering curve: completions in endless repetition",
            columns=["stage", "layer", "direction", "strength", "window", "n", "looped", "low", "high",
                     "beyond random",
                     f"p < {floor:g}", "chosen"],
            rows=rows,
            caption="strength: in median residual norms. window: pushed tokens (0: to the end), from completion token "
            f"{low} to {high} on. looped: share, with its 95 % Wilson limits. beyond random: difference to random "
            "directions of equal length, 95 % interval. "
            f"p < {floor:g}: share of all tokens that are so unlikely without steering. "
            f"{FRESH}: other prompts, random numbers and random directions. {self.verdict()}",
        )  # fmt: skip

    def _row(self, stage: str, points: Sequence[CurvePoint], point: CurvePoint) -> list[Cell]:
        push, rate = point.trial.push, point.rate
        beyond = None
        if push.kind in (FEATURE, MEANS):
            difference = margin(points, point)
            beyond = f"{difference.estimate:+.3f} ({difference.low:+.3f} .. {difference.high:+.3f})"
        steered = push.kind != UNSTEERED
        return [
            stage, push.layer, push.name, point.trial.strength if steered else None,
            point.trial.window_length if steered else None, point.samples, *rate, beyond, point.unlikely_share,
            CHOSEN if point is self.chosen or (stage == FRESH and push.kind == FEATURE) else "",
        ]  # fmt: skip

    def _fresh(self, kind: str) -> CurvePoint:
        return next(point for point in self.fresh if point.trial.push.kind == kind)


def _control(points: Sequence[CurvePoint], kind: str, like: CurvePoint) -> CurvePoint | None:
    same = (point for point in points if point.trial.push.kind == kind and point.setting == like.setting)
    return next(same, None)
