"""The steering curve of a FeatureSet as figures: share of loops like the model's own over strength, layer by layer."""

from __future__ import annotations

from typing import Any

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find.repetition_choice import CHOSEN, SCAN
from qscope_posttrain.features.find.repetition_curve import RANDOM
from qscope_posttrain.report.plots import Curve, line_curves

CURVE_KEY = "steering_curve"


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
    layers = dict.fromkeys(point["layer"] for point in shown)
    return {layer: _figure([point for point in shown if point["layer"] == layer]) for layer in layers}


def _figure(points: list[dict[str, Any]]) -> str:
    curves = []
    for name in dict.fromkeys(point["direction"] for point in points):
        own = sorted((point for point in points if point["direction"] == name), key=lambda point: point["strength"])
        strengths, looped, low, high = ([p[key] for p in own] for key in ("strength", "like own", "low", "high"))
        banded = name.startswith(RANDOM) or any(point["chosen"] == CHOSEN for point in own)
        curves.append(Curve(name, strengths, looped, *((low, high) if banded else (None, None))))
    return line_curves(
        curves,
        f"strength in layer {points[0]['layer']}, median residual norms",
        "loops like the model's own",
        percent=True,
    )
