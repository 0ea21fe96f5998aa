"""From a FeatureSet to a Steering: which direction, where, and how strong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import FREE_DIRECTION, LayerFeatures
from qscope_posttrain.models.positions import Positions
from qscope_posttrain.models.steering_spec import READS_A_FEATURE, Mode, Steering, Unit
from qscope_posttrain.models.steering_spec import unit as unit_vectors

SETTINGS_KEY = "steering"
"""Entry of `FeatureSet.settings` with the choice of a steering curve: `label`, `layer`, `strength`, `unit`, and for
the trainer `window_start` [low, high] and `window_length`."""


def feature_steering(
    features: FeatureSet,
    *,
    layer: int | None = None,
    strength: float | None = None,
    unit: Unit | None = None,
    positions: Positions = "generated",
    rows: Tensor | None = None,
    mode: Mode = "add",
    label: str | None = None,
) -> Steering:
    """Steer along the features of one label in one layer.

    `add` and `project_out` use the unit vector along the sum of the unit decoder rows, so that every feature has equal
    weight, however long its row is. `ablate` and `clamp` use one feature, with its own encoder row, bias and decoder
    row. Defaults come from `features.settings["steering"]`, which `find-repetition` writes; the strength only for the
    label, layer, unit and mode (`add`) with which it was chosen.

    Args:
        strength: see `Steering`; by default 1, all of it, for `project_out` and `ablate`.
        unit: by default `relative`, and for `clamp` `raw`: the feature's activation.
        rows: bool `[rows]`, rows of the batch to steer; None for all.
        label: language or class of the rows to steer along; by default the only one.
    """
    chosen: Mapping[str, Any] = features.settings.get(SETTINGS_KEY, {})
    if not isinstance(chosen, Mapping):
        raise UserValueError(
            f"settings[{SETTINGS_KEY!r}] of this FeatureSet must be an object with layer and strength; got {chosen!r}."
        )
    label = _label(features, chosen.get("label") if label is None else label)
    layer = _required("layer", chosen.get("layer") if layer is None else layer)
    if layer not in features.layers:
        raise UserValueError(f"layer {layer} is not in this FeatureSet; it has {', '.join(map(str, features.layers))}.")
    found = features.layers[layer]
    of_label = [row for row, name in enumerate(found.labels) if name == label]
    if not of_label:
        raise UserValueError(
            f"Layer {layer} has no row labeled {label!r}; it has {', '.join(sorted(set(found.labels)))}."
        )
    if unit is None:
        unit = "raw" if mode == "clamp" else chosen.get("unit", "relative")
    if strength is None:
        used = {"label": label, "layer": layer, "unit": unit, "mode": mode}
        strength = 1.0 if mode in ("project_out", "ablate") else _chosen_strength(chosen, used)
    norms = {layer: found.residual_median_norm}
    common: dict[str, Any] = {"layers": (layer,), "strength": strength, "mode": mode, "unit": unit}
    common |= {"positions": positions, "rows": rows, "residual_norms": norms}
    if mode in READS_A_FEATURE:
        row = _single_feature(found, of_label, mode)
        return Steering(
            found.decoder[row], encoder=found.encoder[row], encoder_bias=float(found.encoder_bias[row]), **common
        )
    return Steering(unit_vectors(unit_vectors(found.decoder[of_label]).sum(0)), **common)


def _label(features: FeatureSet, label: str | None) -> str:
    if label is not None:
        features.language_index(label)
        return label
    labels = sorted({name for rows in features.layers.values() for name in rows.labels})
    if len(labels) > 1:
        raise UserValueError(f"This FeatureSet has rows of {', '.join(labels)}; give label=, the one to steer along.")
    return labels[0]


def _required(name: str, value: Any) -> Any:
    if value is None:
        raise UserValueError(
            f"No {name} given, and this FeatureSet has none chosen in settings[{SETTINGS_KEY!r}]; give {name}=, or use "
            "features from `qscope features find-repetition`."
        )
    return value


def _chosen_strength(chosen: Mapping[str, Any], used: Mapping[str, Any]) -> float:
    """The strength of a steering curve, if the use is the one with which the curve was made."""
    strength: float = _required("strength", chosen.get("strength"))
    made_with = {"unit": "relative", "mode": "add", **chosen}
    different = [name for name, value in used.items() if made_with.get(name, value) != value]
    if different:
        details = ", ".join(f"{name} {made_with[name]!r}, not {used[name]!r}" for name in different)
        raise UserValueError(f"Strength {strength} of this FeatureSet was chosen for {details}; give strength=.")
    return strength


def _single_feature(found: LayerFeatures, of_label: list[int], mode: Mode) -> int:
    if len(of_label) > 1:
        names = ", ".join(found.names[row] for row in of_label)
        raise UserValueError(
            f"mode {mode!r} is about one feature, but there are {len(of_label)}: {names}; select() one."
        )
    row = of_label[0]
    if int(found.feature_ids[row]) == FREE_DIRECTION:
        raise UserValueError(
            f"mode {mode!r} needs a feature of an SAE; {found.names[row]} is a free direction: mode 'project_out' "
            "removes it."
        )
    return row
