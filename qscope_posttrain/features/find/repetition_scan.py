"""The scan behind a steering curve: features alone and summed, next to their controls, and then a fresh look."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.directions import random_directions
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find.repetition_choice import SteeringCurve, choose
from qscope_posttrain.features.find.repetition_curve import (
    FEATURE,
    MEANS,
    RANDOM,
    UNSTEERED,
    CurvePoint,
    CurveSettings,
    Push,
    Trial,
    measure,
)
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.models.steering_spec import unit

_FRESH_SEED = 7919
"""Added to the seed for the final check."""


@dataclass(frozen=True)
class Contrast:
    """The label whose rows are tried, and the two classes of the difference of means: by their place in the set."""

    label: str
    inside: int
    outside: int


def steering_curve(
    model: nn.Module,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    features: FeatureSet,
    contrast: Contrast,
    settings: CurveSettings,
    *,
    periods: tuple[int, int] | None = None,
    show_progress: bool | None = None,
) -> SteeringCurve:
    """Try rows of every layer, alone and summed, at every strength and window; choose one; measure it again.

    Candidates of a layer are its first rows one by one, the sum of the first two, and the sum of all, where a sum is
    the unit vector along the sum of the unit decoder rows (what `features.steering.feature_steering` uses). Each is
    measured next to random directions and the difference of means of the same length.

    The scan and the final check take different completions: other prompts where there are enough of them, and other
    random numbers, starts and random directions.

    Args:
        prompt_ids: encoded prompts; they are shuffled.
        periods: block lengths of the model's own loops, see `LoopCollection.periods`; only such loops count for the
            choice. None for any.

    Raises:
        ValueError: no prompts, or a difference of means of zero.
    """
    if not prompt_ids:
        raise UserValueError("No prompts for the steering curve; give at least one.")
    features.check_model(model)
    seed = settings.sampling.seed
    shuffled = random.Random(seed).sample(list(prompt_ids), len(prompt_ids))
    trials = [Trial(Push(UNSTEERED, UNSTEERED))]
    for layer, rows in features.layers.items():
        pushes = [*candidates(layer, rows, contrast, settings), *controls(layer, rows, contrast, settings, seed)]
        trials += [
            Trial(push, strength, length)
            for strength in settings.strengths
            for length in settings.window_lengths
            for push in pushes
        ]
    shown: dict[str, Any] = {"periods": periods, "show_progress": show_progress}
    scan = measure(model, tokenizer, shuffled, trials, settings.samples, settings, seed=seed, **shown)
    chosen = choose(scan, settings.max_unlikely_share)
    fresh: list[CurvePoint] = []
    if chosen is not None:
        used = settings.samples % len(shuffled)
        fresh = measure(
            model,
            tokenizer,
            shuffled[used:] + shuffled[:used],
            _final_trials(chosen, features, contrast, settings),
            settings.fresh_samples,
            settings,
            seed=seed + _FRESH_SEED,
            description="the choice, measured again",
            **shown,
        )
    return SteeringCurve(tuple(scan), chosen, tuple(fresh), settings, periods)


def candidates(layer: int, rows: LayerFeatures, contrast: Contrast, settings: CurveSettings) -> Iterator[Push]:
    """Rows of the label: the first ones alone, the first two together, and all together."""
    mine = [row for row, label in enumerate(rows.labels) if label == contrast.label]
    groups = [(row,) for row in mine[: settings.single_rows]] + [tuple(mine[:2]), tuple(mine)]
    for group in dict.fromkeys(groups):
        name = " + ".join([rows.names[group[0]], *(f"#{int(rows.feature_ids[row])}" for row in group[1:])])
        vector = unit(unit(rows.decoder[list(group)]).sum(0))
        yield Push(FEATURE, name, layer, vector[None], rows.residual_median_norm, group)


def controls(layer: int, rows: LayerFeatures, contrast: Contrast, settings: CurveSettings, seed: int) -> Iterator[Push]:
    """Random directions, and the difference of means between the two classes."""
    drawn = random_directions(torch.ones(settings.random_directions), rows.d_model, seed + layer)
    yield Push(RANDOM, f"random ({len(drawn)} directions)", layer, drawn, rows.residual_median_norm)
    difference = rows.mean_residual[contrast.inside] - rows.mean_residual[contrast.outside]
    if not bool(difference.any()):
        raise UserValueError(
            f"Layer {layer}: both classes have the same mean residual, so there is no difference of means."
        )
    yield Push(MEANS, MEANS, layer, unit(difference)[None], rows.residual_median_norm)


def _final_trials(chosen: CurvePoint, features: FeatureSet, contrast: Contrast, settings: CurveSettings) -> list[Trial]:
    trial = chosen.trial
    layer = trial.push.layer
    if layer is None:
        raise UserValueError("The unsteered model cannot be chosen.")
    seed = settings.sampling.seed + _FRESH_SEED
    pushes = [trial.push, *controls(layer, features.layers[layer], contrast, settings, seed)]
    return [
        Trial(Push(UNSTEERED, UNSTEERED)),
        *(Trial(push, trial.strength, trial.window_length) for push in pushes),
    ]
