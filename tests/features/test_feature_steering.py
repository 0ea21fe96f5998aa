"""A FeatureSet as a Steering: the direction by hand, defaults from the chosen settings, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.steering import feature_steering
from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.models.positions import Window
from qscope_posttrain.models.steering import steer

D = 64
CHOSEN = {"label": "loop", "layer": 2, "strength": 0.5, "unit": "relative", "window_start": [4, 9], "window_length": 16}
IDS = torch.arange(3, 15).view(2, 6)


def rows(*labels: str, seed: int = 0, free: bool = False) -> LayerFeatures:
    """Random rows of different lengths, with a label each; the statistics do not matter here."""
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    decoder = torch.randn(count, D, generator=generator) * torch.arange(1.0, count + 1)[:, None]
    return LayerFeatures(
        feature_ids=torch.full((count,), -1) if free else torch.arange(count),
        labels=labels,
        names=tuple(f"{label} #{index}" for index, label in enumerate(labels)),
        encoder=torch.randn(count, D, generator=generator),
        encoder_bias=torch.randn(count, generator=generator),
        decoder=decoder,
        scores=torch.zeros(count),
        effects=torch.zeros(count),
        mean_activation=torch.zeros(2, count),
        firing_rate=torch.zeros(2, count),
        tokens=torch.tensor([10, 10]),
        mean_residual=torch.zeros(2, D),
        residual_median_norm=7.5,
        encoder_mean=torch.zeros(2, count),
        encoder_covariance=torch.zeros(2, count, count),
        decoder_mean=torch.zeros(2, count),
        decoder_covariance=torch.zeros(2, count, count),
    )


def feature_set(layers: dict[int, LayerFeatures], chosen: dict | None = None) -> FeatureSet:
    model = {"model_type": "qwen3", "hidden_size": D, "num_hidden_layers": 4}
    settings = {} if chosen is None else {"steering": chosen}
    return FeatureSet(model=model, languages=("loop", "normal"), layers=layers, settings=settings)


def test_direction_is_the_unit_sum_of_unit_rows_of_the_label():
    features = feature_set({2: rows("loop", "normal", "loop")}, CHOSEN)
    first, _, third = features.layers[2].decoder
    total = first / first.norm() + third / third.norm()
    steering = feature_steering(features)
    torch.testing.assert_close(steering.direction, total / total.norm())
    assert (steering.layers, steering.strength, steering.unit, steering.mode) == ((2,), 0.5, "relative", "add")
    assert steering.positions == "generated"
    other = feature_steering(features, label="normal", strength=1.0)
    torch.testing.assert_close(other.direction, features.layers[2].decoder[1] / features.layers[2].decoder[1].norm())


def test_arguments_come_before_what_was_chosen():
    features = feature_set({1: rows("loop", seed=1), 2: rows("loop")}, CHOSEN)
    window, mask = Window(3, 4), torch.tensor([True, False])
    steering = feature_steering(features, layer=1, strength=-3, unit="norm", positions=window, rows=mask)
    assert (steering.layers, steering.strength, steering.unit) == ((1,), -3, "norm")
    assert steering.positions is window
    assert torch.equal(steering.rows, mask)
    assert feature_steering(features, strength=2.0).unit == "relative"


def test_relative_strength_is_a_share_of_the_median_norm(make_model):
    model = make_model()
    features = feature_set({2: rows("loop")}, CHOSEN)
    plain = forward_to_layer(model, [2], input_ids=IDS)[2]
    with steer(model, feature_steering(features, positions="all")):
        shift = forward_to_layer(model, [2], input_ids=IDS)[2] - plain
    torch.testing.assert_close(shift.norm(dim=-1), torch.full((2, 6), 0.5 * 7.5))


@pytest.mark.parametrize("mode", ["ablate", "clamp"])
def test_modes_of_one_feature_use_its_own_rows(make_model, mode):
    model = make_model()
    found = rows("loop", "normal")
    features = feature_set({2: found})
    h = forward_to_layer(model, [2], input_ids=IDS)[2]
    activation = (h @ found.encoder[0] + found.encoder_bias[0]).relu()
    assert activation.any()
    strength = {"ablate": None, "clamp": 4.0}[mode]
    target = {"ablate": 0.0, "clamp": 4.0}[mode]
    steering = feature_steering(features, layer=2, mode=mode, strength=strength, label="loop", positions="all")
    with steer(model, steering):
        changed = forward_to_layer(model, [2], input_ids=IDS)[2]
    torch.testing.assert_close(changed, h + (target - activation)[..., None] * found.decoder[0])


def test_projecting_out_needs_no_strength():
    features = feature_set({2: rows("loop", free=True)})
    assert feature_steering(features, layer=2, mode="project_out").strength == 1.0


@pytest.mark.parametrize(
    ("chosen", "arguments", "message"),
    [
        (None, {"strength": 1.0, "label": "loop"}, "No layer given.*give layer="),
        (None, {"layer": 2, "label": "loop"}, "No strength given.*find-repetition"),
        (CHOSEN, {"mode": "clamp"}, "chosen for unit 'relative', not 'raw', mode 'add', not 'clamp'; give strength="),
        (CHOSEN, {"layer": 1}, "chosen for layer 2, not 1"),
        (CHOSEN, {"unit": "norm"}, "chosen for unit 'relative', not 'norm'"),
        (CHOSEN, {"label": "normal"}, "chosen for label 'loop', not 'normal'"),
        (CHOSEN, {"layer": 3}, "layer 3 is not in this FeatureSet; it has 1, 2"),
        (CHOSEN, {"label": "zh"}, "'zh' is not in this FeatureSet"),
        (CHOSEN, {"layer": 1, "label": "normal", "strength": 1.0}, "no row labeled 'normal'; it has loop"),
        (CHOSEN, {"mode": "ablate"}, "there are 2: loop #0, loop #1"),
        ({"layer": 2, "strength": 1.0}, {}, "rows of loop, normal; give label="),
        ([1], {}, "must be an object"),
    ],
)
def test_mistakes(chosen, arguments, message):
    features = feature_set({1: rows("loop"), 2: rows("loop", "loop", "normal")}, chosen)
    with pytest.raises(ValueError, match=message):
        feature_steering(features, **arguments)


def test_a_free_direction_has_no_activation():
    features = feature_set({2: rows("loop", free=True)}, CHOSEN)
    with pytest.raises(ValueError, match="free direction: mode 'project_out'"):
        feature_steering(features, mode="ablate")


def test_an_unmeasured_norm_is_no_unit():
    features = feature_set({2: replace(rows("loop"), residual_median_norm=math.nan)}, CHOSEN)
    with pytest.raises(ValueError, match="finite"):
        feature_steering(features)
    assert feature_steering(features, unit="norm", strength=1.0).unit == "norm"
