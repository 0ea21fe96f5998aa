"""Choose how to steer a model into its own loops: scan features, sums and controls, and re-measure the best choice."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.dose_curve import (
    FEATURE,
    MEANS,
    RANDOM,
    UNSTEERED,
    CurvePoint,
    CurveSettings,
    Trial,
    controls,
    measure_loops,
)
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.steering import SETTINGS_KEY
from qscope_posttrain.intervals import Interval, rate_difference
from qscope_posttrain.models.steering_spec import unit
from qscope_posttrain.report.plots import Curve, line_curves
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.tables import Cell, Table

LOOP, NORMAL = "loop", "normal"
ONE_STANDARD_ERROR = 0.6827
SCAN, FRESH = "scan", "fresh"
CHOSEN = "*"
CURVE_KEY = "steering_curve"
_FRESH_SEED = 7919  # Added to the seed for the final check


def margin(points: Sequence[CurvePoint], point: CurvePoint, level: float = 0.95) -> Interval:
    """Share of loops like the model's own, minus that of random directions with the same layer, strength and window."""
    for other in points:
        if other.trial.kind == RANDOM and other.trial.setting == point.trial.setting:
            return rate_difference((point.own, point.samples), (other.own, other.samples), level)
    raise UserValueError(f"No random directions were measured at layer, strength and window {point.trial.setting}.")


def choose(points: Sequence[CurvePoint], max_unlikely_share: float = 1.0) -> CurvePoint | None:
    """Choose the point to steer with, by its margin over random directions; None if no feature point qualifies.

    Only loops like the model's own count: a strong push can make any model stutter ("6 6 6 6"), which is not the habit
    that training is to remove. And early layers loop after any push of sufficient length, so that the share of loops
    says nothing about the feature.

    1. Eligible are the feature points whose `margin` is above 0 with its whole 95 % interval; if there are none, all
       feature points with such a loop.
    2. The best is the one with the largest margin. Within its reach are those whose margin is not below the best one's
       lower limit of one standard error: a scan cannot distinguish them.
    3. Of these, the one with the smallest share of unlikely tokens: a negative example close to the model's own text
       teaches about the loop and not about the text before it. Ties: the smaller strength, then the larger margin.

    Points with more than `max_unlikely_share` unlikely tokens are excluded.
    """
    looping = [
        point
        for point in points
        if point.trial.kind == FEATURE and point.own > 0 and point.unlikely_share <= max_unlikely_share
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
    chosen: CurvePoint | None  # None when no push along a feature made anything loop
    fresh: tuple[CurvePoint, ...]  # It, random directions, difference of means and no steering, on other prompts
    settings: CurveSettings
    periods: tuple[int, int] | None = None  # Shortest and longest block of a loop like the model's own; None for any

    @property
    def specific(self) -> bool:
        """Whether the chosen features make loops like the model's own more often than random directions do, on
        completions that they were not chosen by."""
        return self.chosen is not None and margin(self.fresh, self._fresh(FEATURE)).low > 0

    def verdict(self) -> str:
        """One sentence on the result."""
        if self.chosen is None:
            return "No push along these features made the model loop as it does by itself: nothing is chosen."
        point, control = self._fresh(FEATURE), self._fresh(RANDOM)
        where = f"{point.trial.name} in layer {point.trial.layer} at strength {point.trial.strength:g}"
        rates = f"{point.rate.estimate:.0%} of completions against {control.rate.estimate:.0%} with random directions"
        if self.specific:
            return f"Chosen: {where}, looping like the model itself in {rates}."
        return (
            f"Not specific: {where} loops like the model itself in {rates}, which is not clearly more. It is recorded "
            "with specific=false: do not train on it as a repetition feature."
        )

    def to_settings(self, label: str) -> dict[str, Any] | None:
        """`FeatureSet.settings["steering"]`: how to steer, and the results of the final check; None without a choice.

        `looped`, `random`, `difference_of_means` and `unsteered` are the shares of `samples` completions each that
        loop in any way; with the prefix `own_`, in blocks of `periods` [shortest, longest] tokens.
        """
        if self.chosen is None:
            return None
        point = self._fresh(FEATURE)
        names = {"looped": FEATURE, "random": RANDOM, "difference_of_means": MEANS, "unsteered": UNSTEERED}
        return {
            "label": label,
            "layer": point.trial.layer,
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
        rows: list[list[Cell]] = []
        for stage, points in ((SCAN, self.scan), (FRESH, self.fresh)):
            for point in points:
                trial, beyond = point.trial, None
                if trial.kind in (FEATURE, MEANS):
                    difference = margin(points, point)
                    beyond = f"{difference.estimate:+.3f} ({difference.low:+.3f} .. {difference.high:+.3f})"
                setting = (trial.strength, trial.window_length) if trial.kind != UNSTEERED else (None, None)
                chosen = point is self.chosen or (stage == FRESH and trial.kind == FEATURE)
                rows.append([
                    stage, trial.layer, trial.name, *setting, point.samples, point.looped_share, *point.rate, beyond,
                    point.unlikely_share, CHOSEN if chosen else "",
                ])  # fmt: skip
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

    def _fresh(self, kind: str) -> CurvePoint:
        return next(point for point in self.fresh if point.trial.kind == kind)


def steering_curve(
    model: nn.Module,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    features: FeatureSet,
    settings: CurveSettings,
    *,
    periods: tuple[int, int] | None = None,
    show_progress: bool | None = None,
) -> SteeringCurve:
    """Try rows of every layer, alone and summed, at every strength and window; choose one; measure it again.

    Candidates of a layer are its first rows one by one, the sum of the first two, and the sum of all, where a sum is
    the unit vector along the sum of the unit decoder rows (what `features.steering.feature_steering` uses). Each is
    measured next to random directions and the difference of means of the same length.

    The scan and the final check take different completions: other prompts where there are enough of them (they are
    shuffled), and other random numbers, starts and random directions. Only loops within `periods` (see
    `LoopCollection.periods`; None for any) count for the choice.
    """
    features.check_model(model)
    seed = settings.sampling.seed
    shuffled = random.Random(seed).sample(list(prompt_ids), len(prompt_ids))
    trials = [Trial(UNSTEERED, UNSTEERED)]
    for layer, rows in features.layers.items():
        pushes = [*candidates(layer, rows, settings), *_controls(features, layer, settings, seed)]
        trials += [
            replace(push, strength=strength, window_length=length)
            for strength in settings.strengths
            for length in settings.window_lengths
            for push in pushes
        ]
    shown: dict[str, Any] = {"periods": periods, "show_progress": show_progress}
    scan = measure_loops(model, tokenizer, shuffled, trials, settings.samples, settings, seed=seed, **shown)
    chosen = choose(scan, settings.max_unlikely_share)
    fresh: list[CurvePoint] = []
    if chosen is not None and chosen.trial.layer is not None:
        trial = chosen.trial
        again = _controls(features, chosen.trial.layer, settings, seed + _FRESH_SEED)
        same: dict[str, Any] = {"strength": trial.strength, "window_length": trial.window_length}
        trials = [trials[0], trial, *(replace(push, **same) for push in again)]
        used = settings.samples % len(shuffled)
        others = shuffled[used:] + shuffled[:used]
        shown |= {"seed": seed + _FRESH_SEED, "description": "the choice, measured again"}
        fresh = measure_loops(model, tokenizer, others, trials, settings.fresh_samples, settings, **shown)
    return SteeringCurve(tuple(scan), chosen, tuple(fresh), settings, periods)


def candidates(layer: int, rows: LayerFeatures, settings: CurveSettings) -> Iterator[Trial]:
    """Rows labeled "loop": the first ones alone, the first two together, and all together."""
    mine = [row for row, label in enumerate(rows.labels) if label == LOOP]
    groups = [(row,) for row in mine[: settings.single_rows]] + [tuple(mine[:2]), tuple(mine)]
    for group in dict.fromkeys(groups):
        name = " + ".join([rows.names[group[0]], *(f"#{int(rows.feature_ids[row])}" for row in group[1:])])
        vector = unit(unit(rows.decoder[list(group)]).sum(0))
        yield Trial(FEATURE, name, layer, vector[None], rows.residual_median_norm, group)


def _controls(features: FeatureSet, layer: int, settings: CurveSettings, seed: int) -> Iterator[Trial]:
    """Random directions, and the difference of means between loops and ordinary completions."""
    rows = features.layers[layer]
    classes = [features.language_index(name) for name in (LOOP, NORMAL)]
    means = rows.mean_residual[classes]
    for kind, vectors in controls(means, 0, settings.random_directions, seed + layer).items():
        if not bool(vectors.any()):
            raise UserValueError(f"Layer {layer}: both classes have the same mean residual: no difference of means.")
        name = f"random ({len(vectors)} directions)" if kind == RANDOM else kind
        yield Trial(kind, name, layer, vectors if kind == RANDOM else unit(vectors), rows.residual_median_norm)


def with_choice(features: FeatureSet, curve: SteeringCurve) -> FeatureSet:
    """Add the curve, and keep only the chosen rows of the chosen layer; warn of a choice that is not specific."""
    settings = {**features.settings, "curve": asdict(curve.settings)}
    layers = dict(features.layers)
    chosen = curve.to_settings(LOOP)
    if curve.chosen is not None and chosen is not None:
        settings[SETTINGS_KEY] = chosen
        layers[chosen["layer"]] = layers[chosen["layer"]].take(curve.chosen.trial.rows)
    if not curve.specific:
        status(f"warning: {curve.verdict()}", enabled=True)
    provenance = {**features.provenance, CURVE_KEY: curve.to_table().to_dict()}
    return replace(features, layers=layers, settings=settings, provenance=provenance)


def curve_figures(features: FeatureSet) -> dict[int, str]:
    """An SVG for every layer that was scanned, from `provenance["steering_curve"]`; none without a curve.

    Curves are the directions of the scan at the chosen window (without a choice, at the first one). The chosen
    direction and the random ones have a band: their Wilson interval.
    """
    table = features.provenance.get(CURVE_KEY)
    if table is None:
        return {}
    points = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    steered = [point for point in points if point["stage"] == SCAN and point["layer"] is not None]
    chosen = next((point for point in steered if point["chosen"] == CHOSEN), steered[0])
    shown = [point for point in steered if point["window"] == chosen["window"]]
    figures = {}
    for layer in dict.fromkeys(point["layer"] for point in shown):
        curves = []
        for name in dict.fromkeys(point["direction"] for point in shown if point["layer"] == layer):
            own = [point for point in shown if (point["layer"], point["direction"]) == (layer, name)]
            own.sort(key=lambda point: point["strength"])
            strengths, looped, low, high = ([p[key] for p in own] for key in ("strength", "like own", "low", "high"))
            banded = name.startswith(RANDOM) or any(point["chosen"] == CHOSEN for point in own)
            curves.append(Curve(name, strengths, looped, *((low, high) if banded else (None, None))))
        label = f"strength in layer {layer}, median residual norms"
        figures[layer] = line_curves(curves, label, "loops like the model's own", percent=True)
    return figures
