from __future__ import annotations

import math

import pytest

from qscope_posttrain.sae.training import SAETrainingConfig


def test_learning_rate_schedule() -> None:
    config = SAETrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, decay_start=0.7)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:71] == [pytest.approx(1.0)] * 62
    assert rates[85] == pytest.approx(0.02 + 0.98 * 0.5)
    assert rates[99] == pytest.approx(0.02 + 0.98 / 30)
    assert SAETrainingConfig(warmup_steps=0, decay_start=1.0).rate(0) == 3e-3
    assert SAETrainingConfig(steps=100, decay_start=0.0, warmup_steps=0, final_rate=0.0).rate(50) == 0.5 * 3e-3


def test_k_falls_linearly_to_k() -> None:
    config = SAETrainingConfig(steps=50, k=10, k_start=50, k_anneal_steps=20)
    ks = [config.k_at(step) for step in range(50)]
    assert ks == [round(50 - 2 * step) for step in range(20)] + [10] * 30
    assert SAETrainingConfig(k=7).k_at(0) == 7


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"architecture": "relu"}, "architecture must be one of topk, batch_topk, jumprelu"),
        ({"k": 0}, "k must be an integer from 1, got 0"),
        ({"k": True}, "k must be an integer from 1, got True"),
        ({"steps": 1.5}, "steps must be an integer from 1"),
        ({"width": 0}, "width must be an integer from 1, or None"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"decay_start": 1.5}, "decay_start must be a share"),
        ({"final_rate": -0.1}, "final_rate must be a share"),
        ({"auxk_weight": -1.0}, "auxk_weight must be 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
        ({"beta2": 1.0}, "beta2 must be from 0 to below 1"),
        ({"bandwidth": 0.0}, "bandwidth must be above 0"),
        ({"k_start": 64}, "give both to anneal k, or neither"),
        ({"k_anneal_steps": 10}, "give both to anneal k, or neither"),
        ({"k_start": 64, "k_anneal_steps": 300}, "k would never be reached"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SAETrainingConfig(**settings)


def test_width_must_hold_k() -> None:
    assert SAETrainingConfig(expansion=4).latents(32) == 128
    with pytest.raises(ValueError, match="k=40 latents are to fire, but the dictionary would have only 32"):
        SAETrainingConfig(width=32, k=8, k_start=40, k_anneal_steps=2).latents(16)
