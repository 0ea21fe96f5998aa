"""Readouts, thresholds, scales and combinations against numbers computed from samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sft.cases import make_features

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.sft.callback import penalty_layers
from qscope_posttrain.sft.config import PAPER, SASFTConfig


@pytest.fixture(scope="module")
def samples():
    """Residual vectors of three languages, 50 to 150 tokens each."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(50 * (i + 1), 64, generator=generator) + 0.5 * i for i in range(3)]


@pytest.fixture(scope="module")
def features(make_model, samples) -> FeatureSet:
    """Layer 2 with four zh rows, whose statistics are those of `samples`."""
    plain = make_features(make_model(), layers=(2,), rows=4)
    rows = plain.layers[2]

    def moments(directions, bias):
        f = [x @ directions.T + bias for x in samples]
        return torch.stack([v.mean(0) for v in f]), torch.stack([torch.cov(v.T, correction=0) for v in f])

    encoder_mean, encoder_covariance = moments(rows.encoder, rows.encoder_bias)
    decoder_mean, decoder_covariance = moments(rows.decoder, torch.zeros(4))
    return replace(
        plain,
        layers={
            2: replace(
                rows,
                scores=torch.tensor([1.0, 3.0, -2.0, 2.0]),
                effects=torch.tensor([0.5, -1.0, 2.0, 0.25]),
                encoder_mean=encoder_mean,
                encoder_covariance=encoder_covariance,
                decoder_mean=decoder_mean,
                decoder_covariance=decoder_covariance,
                tokens=torch.tensor([len(x) for x in samples]),
            )
        },
    )


def excess_of(features, hidden, language, **options):
    (layer,) = penalty_layers(features, SASFTConfig(**options))
    ids = torch.full((1, len(hidden)), features.languages.index(language))
    alone = torch.eye(len(hidden), dtype=torch.bool)
    return torch.stack([layer.penalty(hidden[None], ids, token[None]).sums for token in alone])


@pytest.mark.parametrize("readout", ["encoder", "decoder"])
@pytest.mark.parametrize("threshold", ["language_mean", "zero"])
@pytest.mark.parametrize("scale", ["raw", "std"])
def test_each_row_on_its_own(features, samples, readout, threshold, scale):
    rows = features.layers[2]
    directions = rows.encoder if readout == "encoder" else rows.decoder
    bias = rows.encoder_bias if readout == "encoder" else torch.zeros(4)
    f = [x @ directions.T + bias for x in samples]
    sigma = torch.cat([f[0], f[2]]).std(0, correction=0) if scale == "std" else torch.ones(4)  # zh is language 1
    for language, index in (("en", 0), ("fr", 2)):
        alpha = f[index].mean(0) if threshold == "language_mean" else torch.zeros(4)
        found = excess_of(
            features, samples[0], language, readout=readout, threshold=threshold, scale=scale, combine="none"
        )
        assert torch.allclose(found, torch.relu((f[0] - alpha) / sigma), atol=1e-4)


@pytest.mark.parametrize(
    ("combine", "weights"),
    [
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("monolinguality", [1 / 6, 3 / 6, 0.0, 2 / 6]),
        ("effect", [0.5 / 2.75, 0.0, 2 / 2.75, 0.25 / 2.75]),
    ],
)
@pytest.mark.parametrize("readout", ["encoder", "decoder"])
@pytest.mark.parametrize("scale", ["raw", "std"])
def test_combined_into_one_readout(features, samples, combine, weights, readout, scale):
    rows = features.layers[2]
    weights = torch.tensor(weights)
    direction = weights @ (rows.encoder if readout == "encoder" else rows.decoder)
    bias = weights @ rows.encoder_bias if readout == "encoder" else 0.0
    f = [x @ direction + bias for x in samples]
    sigma = torch.cat([f[0], f[2]]).std(correction=0) if scale == "std" else 1.0
    found = excess_of(features, samples[0], "fr", combine=combine, readout=readout, scale=scale)
    assert found.shape == (len(samples[0]), 1)
    assert torch.allclose(found[:, 0], torch.relu((f[0] - f[2].mean()) / sigma), atol=1e-4)


def test_top_takes_the_highest_scores(features):
    (layer,) = penalty_layers(features, SASFTConfig(top=2, **PAPER))
    assert layer.names == ("layer 2 zh #1", "layer 2 zh #3")
    assert torch.equal(layer.rows, features.layers[2].encoder[[1, 3]])


def test_what_cannot_work_is_refused(features):
    rows = features.layers[2]
    with pytest.raises(ValueError, match="'ko' is not in this FeatureSet"):
        penalty_layers(features, SASFTConfig(target="ko"))
    with pytest.raises(ValueError, match="layer 1 is not in this FeatureSet; it has 2"):
        penalty_layers(features, SASFTConfig(layers=(1,)))
    unmeasured = replace(features, layers={2: replace(rows, effects=torch.full((4,), float("nan")))})
    with pytest.raises(ValueError, match="measure_effects"):
        penalty_layers(unmeasured, SASFTConfig(combine="effect"))
    negative = replace(features, layers={2: replace(rows, effects=-rows.effects.abs())})
    with pytest.raises(ValueError, match="no row of layer 2 has a positive weight"):
        penalty_layers(negative, SASFTConfig(combine="effect"))
    flat = replace(
        features,
        layers={
            2: replace(
                rows,
                encoder_mean=torch.ones_like(rows.encoder_mean),
                encoder_covariance=torch.zeros_like(rows.encoder_covariance),
            )
        },
    )
    with pytest.raises(ValueError, match="never varies"):
        penalty_layers(flat, SASFTConfig(readout="encoder", scale="std", combine="none"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "both"}, "readout must be one of 'encoder', 'decoder'"),
        ({"combine": "sum"}, "combine must be one of 'none', 'monolinguality'"),
        ({"weight": -1.0}, "weight must be a finite number"),
        ({"weight": float("nan")}, "weight must be a finite number"),
        ({"top": 0}, "top must be at least 1"),
        ({"normalization": "official", "anchor_weight": 1.0}, "published code"),
        ({"normalization": "official", "positions": "predicting"}, "published code"),
        ({"target": "zh", "ignore_languages": ("zh",)}, "cannot be in ignore_languages"),
    ],
)
def test_config_is_checked_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        SASFTConfig(**options)


def test_a_single_row_is_its_own_sum(features):
    rows = features.layers[2]
    unmeasured = torch.full((4,), float("nan"))
    single = replace(features, layers={2: replace(rows, scores=unmeasured, effects=unmeasured)}).select(top=1)
    for combine in ("monolinguality", "effect", "uniform"):
        (layer,) = penalty_layers(single, SASFTConfig(combine=combine))
        (alone,) = penalty_layers(single, SASFTConfig(combine="none"))
        assert torch.allclose(layer.rows, alone.rows)
        assert torch.allclose(layer.thresholds, alone.thresholds)


def test_the_papers_form_is_one_choice_of_options():
    config = SASFTConfig(**PAPER)
    assert (config.readout, config.scale, config.combine, config.positions) == ("encoder", "raw", "none", "response")
    assert SASFTConfig(**PAPER, normalization="official").normalization == "official"


def test_config_accepts_what_yaml_gives_and_returns_json():
    config = SASFTConfig(layers=[2, 3], ignore_languages=["th"], language=len)
    assert config.layers == (2, 3)
    values = config.to_dict()
    assert values["layers"] == [2, 3]
    assert values["language"] == "builtins.len"
