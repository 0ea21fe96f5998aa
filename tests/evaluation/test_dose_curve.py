"""The dose curve on a random model: what it measures equals the definition, and its controls are of equal length."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from qscope_posttrain.evaluation.dose_curve import (
    FEATURE,
    PLAIN,
    RANDOM,
    UNSTEERED,
    dose_curve,
    matches,
    writes_language,
)
from qscope_posttrain.features.dose_curve import MEANS
from qscope_posttrain.features.find.contrast import find_contrastive_features
from qscope_posttrain.features.steering import feature_steering
from qscope_posttrain.models.generation import Sample, SamplingSettings, encode_prompts, sample_batch
from qscope_posttrain.models.scoring import response_losses
from qscope_posttrain.models.steering import steer
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

SETTINGS = SamplingSettings(samples_per_prompt=2, max_new_tokens=8, top_p=1.0)
PROMPTS = ["The river runs", "She reads a book", "A house"]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def features(model, tiny_tokenizer, texts):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(192, 64, generator=generator)
    sae = SparseAutoencoder(rows, torch.zeros(192), rows / 3, torch.zeros(64), TopK(12), layer=3)
    return find_contrastive_features(model, tiny_tokenizer, texts["zh"], texts["en"], {3: sae}, top=2)


def curve_of(model, tokenizer, features, **options):
    given = {"effect": matches("e"), "settings": SETTINGS, "layer": 3, "random_count": 2} | options
    return dose_curve(model, tokenizer, PROMPTS, features, strengths=[4.0, -2.0], **given)


def test_points_are_what_steering_by_hand_gives(model, tiny_tokenizer, features, texts):
    curve = curve_of(model, tiny_tokenizer, features, plain_prompt="In Chinese:", texts=texts["en"][:4])
    kinds = [(point.kind, point.strength) for point in curve.points]
    assert kinds == [(UNSTEERED, 0), (PLAIN, 0)] + [(k, s) for k in (FEATURE, RANDOM, MEANS) for s in (-2, 4)]
    assert [point.samples for point in curve.points] == [6, 6, 6, 6, 12, 12, 6, 6]

    steering = feature_steering(features, layer=3, strength=4.0)
    prompts = encode_prompts(tiny_tokenizer, PROMPTS) * 2
    seed = random.Random(SETTINGS.seed).getrandbits(31)
    with steer(model, steering, require_generated=False):
        responses = sample_batch(model, tiny_tokenizer, prompts, replace(SETTINGS, seed=seed))
    point = next(p for p in curve.points if (p.kind, p.strength) == (FEATURE, 4.0))
    shown = ["e" in tiny_tokenizer.decode(r.tokens, skip_special_tokens=True) for r in responses]
    assert point.effect.estimate == pytest.approx(np.mean(shown))
    loss, tokens = response_losses(model, prompts, [r.tokens for r in responses])
    assert point.perplexity.estimate == pytest.approx(float((loss.sum() / tokens.sum()).exp()))
    assert point.tokens == pytest.approx(np.mean([len(r.tokens) for r in responses]))
    assert point.text_perplexity != curve.unsteered.text_perplexity


def test_an_effect_that_no_response_or_each_one_shows_is_not_certain(model, tiny_tokenizer, features):
    for value, low, high in ((0.0, 0.0, 0.56), (1.0, 0.44, 1.0)):
        curve = curve_of(model, tiny_tokenizer, features, effect=lambda sample, value=value: value)
        effect = curve.unsteered.effect
        assert (effect.estimate, effect.low, effect.high) == pytest.approx((value, low, high), abs=0.01)


def test_steering_hard_costs_more_than_not_at_all(model, tiny_tokenizer, features):
    curve = curve_of(model, tiny_tokenizer, features)
    by_strength = {point.strength: point.perplexity.estimate for point in curve.of(FEATURE)}
    assert list(by_strength) == [-2, 0, 4]
    assert by_strength[4] > by_strength[0]
    assert curve.unsteered.text_perplexity is None
    table = curve.to_table()
    assert len(table.rows) == len(curve.points)
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_controls_have_equal_length_in_raw_units(model, tiny_tokenizer, features, monkeypatch):
    lengths = []
    original = steer

    def spy(model, *steerings, **options):
        lengths.extend(length for s in steerings for length in (s.strength * s.direction).norm(dim=-1).tolist())
        return original(model, *steerings, **options)

    monkeypatch.setattr("qscope_posttrain.features.dose_curve.steer", spy)
    curve_of(model, tiny_tokenizer, features, unit="raw", random_vectors=torch.randn(2, 64) * 7)
    assert sorted({round(length, 4) for length in lengths}) == [2.0, 4.0]


def test_a_component_is_projected_out_as_by_hand(model, tiny_tokenizer, features):
    curve = curve_of(model, tiny_tokenizer, features, mode="project_out", positions="all")
    prompts = encode_prompts(tiny_tokenizer, PROMPTS) * 2
    seed = random.Random(SETTINGS.seed).getrandbits(31)
    steering = feature_steering(features, layer=3, strength=4.0, mode="project_out", positions="all")
    with steer(model, steering):
        responses = sample_batch(model, tiny_tokenizer, prompts, replace(SETTINGS, seed=seed))
    loss, tokens = response_losses(model, prompts, [r.tokens for r in responses])
    point = next(p for p in curve.points if (p.kind, p.strength) == (FEATURE, 4.0))
    assert point.perplexity.estimate == pytest.approx(float((loss.sum() / tokens.sum()).exp()))
    assert point.perplexity != curve.unsteered.perplexity


def test_the_best_is_affordable_or_none(model, tiny_tokenizer, features):
    curve = curve_of(model, tiny_tokenizer, features)
    assert curve.best(max_perplexity_ratio=1e-6) is None
    first = curve.points[0]
    points = [first] + [
        replace(first, kind=FEATURE, strength=s, effect=first.effect._replace(estimate=e))
        for s, e in ((1, 0.2), (2, 0.9))
    ]
    ranked = replace(curve, points=tuple(points))
    assert ranked.best().strength == 2
    assert ranked.best(sign=-1).strength == 1


def test_effects():
    sample = Sample("en", 0, 0, "Say", "Good 你好", True)
    assert writes_language("zh")(sample) == 1
    assert writes_language("ru")(sample) == 0
    assert matches("^Good")(sample) == 1
    with pytest.raises(ValueError, match="regular expression"):
        matches("(")


@pytest.mark.parametrize(
    ("strengths", "options", "message"),
    [
        ([], {}, "other than 0"),
        ([0.0, 1.0], {}, "other than 0"),
        ([1.0], {"mode": "ablate"}, "compares directions"),
        ([1.0], {"layer": 9}, "layer 9"),
        ([1.0], {"random_count": 0}, "random_count"),
    ],
)
def test_refusals(model, tiny_tokenizer, features, strengths, options, message):
    with pytest.raises(ValueError, match=message):
        dose_curve(model, tiny_tokenizer, PROMPTS, features, matches("e"), strengths, **{"layer": 3} | options)
