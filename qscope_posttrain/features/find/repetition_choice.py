"""Which push makes a model loop as it does by itself: features against random directions of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.find.repetition_curve import (
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
    """Share of loops like the model's own, minus that of random directions with the same layer, strength and window.

    Raises:
        ValueError: `points` hold no such random point.
    """
    control = _control(points, RANDOM, point)
    if control is None:
        raise UserValueError(f"No random directions were measured at layer, strength and window {point.setting}.")
    return rate_difference((point.own, point.samples), (control.own, control.samples), level)


def choose(points: Sequence[CurvePoint], max_unlikely_share: float = 1.0) -> CurvePoint | None:
    """The point to steer with, by its margin over random directions and not by its loop share.

    Only loops like the model's own count. A strong push can make any model stutter ("6 6 6 6"): that is no example of
    the habit that training is to remove, and it is unlearnt in a few steps. And early layers loop after any push of
    sufficient length, so that the share alone says nothing about the feature.

    1. Eligible are the feature points whose `margin` is above 0 with its whole 95 % interval; if there are none, all
       feature points with such a loop.
    2. The best is the one with the largest margin. In its reach are those whose margin is not below the best one's
       lower limit of one standard error: a scan cannot tell them apart.
    3. Of these, the one with the smallest share of unlikely tokens: a negative example close to the model's own text
       teaches about the loop and not about the text before it. Ties: the smaller strength, then the larger margin.

    Points with more than `max_unlikely_share` unlikely tokens are out of the question. None if no other feature point
    has a loop like the model's own.
    """
    looping = [
        point
        for point in points
        if point.trial.push.kind == FEATURE and point.own > 0 and point.unlikely_share <= max_unlikely_share
    ]
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
    periods: tuple[int, int] | None = None
    """Shortest and longest block of a loop like the model's own; None for any"""

    @property
    def specific(self) -> bool:
        """Whether the chosen features make loops like the model's own more often than random directions do.

        On completions that they were not chosen by.
        """
        return self.chosen is not None and margin(self.fresh, self._fresh(FEATURE)).low > 0

    def verdict(self) -> str:
        """One sentence on what was found."""
        if self.chosen is None:
            return "No push along these features made the model loop as it does by itself: nothing is chosen."
        point, control = self._fresh(FEATURE), self._fresh(RANDOM)
        push = point.trial.push
        where = f"{push.name} in layer {push.layer} at strength {point.trial.strength:g}"
        rates = f"{point.rate.estimate:.0%} of completions against {control.rate.estimate:.0%} with random directions"
        if self.specific:
            return f"Chosen: {where}, looping like the model itself in {rates}."
        return (
            f"Not specific: {where} loops like the model itself in {rates}, which is not clearly more. It is recorded "
            "with specific=false: do not train on it as a repetition feature."
        )

    def to_settings(self, label: str) -> dict[str, Any] | None:
        """`FeatureSet.settings["steering"]`: what is needed to steer, and what the final check gave; None if nothing.

        `looped`, `random`, `difference_of_means` and `unsteered` are the shares of `samples` completions each that
        loop in whatever way; with the prefix `own_`, in blocks of `periods` [shortest, longest] tokens.
        """
        if self.chosen is None:
            return None
        point = self._fresh(FEATURE)
        names = {"looped": FEATURE, "random": RANDOM, "difference_of_means": MEANS, "unsteered": UNSTEERED}
        return {
            "label": label,
            "layer": point.trial.push.layer,
            "strength": point.trial.strength,
            "unit": "relative",
            "window_start": list(self.settings.window_start),
            "window_length": point.trial.window_length,
            **{name: self._fresh(kind).looped_share for name, kind in names.items()},
            **{f"own_{name}": self._fresh(kind).rate.estimate for name, kind in names.items()},
            "periods": None if self.periods is None else list(self.periods),
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
        blocks = "blocks of {} to {} tokens".format(*self.periods) if self.periods else "blocks of any length"
        return Table(
            title="Steering curve: completions in endless repetition",
            columns=["stage", "layer", "direction", "strength", "window", "n", "looped", "like own", "low", "high",
                     "beyond random", f"p < {floor:g}", "chosen"],
            rows=rows,
            caption="strength: in median residual norms. window: pushed tokens (0: to the end), from completion token "
            f"{low} to {high} on. looped: share in endless repetition. like own: share in {blocks}, as in the model's "
            "own loops, with 95 % Wilson limits. beyond random: difference in it to random directions of equal length, "
            f"95 % interval. p < {floor:g}: share of all tokens that are so unlikely without steering. "
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
            point.trial.window_length if steered else None, point.samples, point.looped_share, *rate,
            beyond, point.unlikely_share,
            CHOSEN if point is self.chosen or (stage == FRESH and push.kind == FEATURE) else "",
        ]  # fmt: skip

    def _fresh(self, kind: str) -> CurvePoint:
        return next(point for point in self.fresh if point.trial.push.kind == kind)


def _control(points: Sequence[CurvePoint], kind: str, like: CurvePoint) -> CurvePoint | None:
    same = (point for point in points if point.trial.push.kind == kind and point.setting == like.setting)
    return next(same, None)
