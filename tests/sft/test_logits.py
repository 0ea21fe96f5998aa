"""Chunked logits against the model's own, and every formula on them written out."""

from __future__ import annotations

import pytest
import torch
from models.other_device import elsewhere

from qscope_posttrain.sft import logits
from qscope_posttrain.sft.logits import (
    LogitHead,
    divergence_from,
    risk_weights,
    target_probability,
    target_surprise,
)

TARGETS = torch.tensor([3, 4, 7])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 3 tokens, so that five tokens make two."""
    monkeypatch.setattr(logits, "CHUNK_TOKENS", 3)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    head = LogitHead(torch.randn(20, 8, generator=generator), torch.randn(20, generator=generator), 0.5, 3.0)
    hidden = torch.randn(5, 8, generator=generator)
    plain = 3.0 * torch.tanh((hidden @ head.weight.T + head.bias) * 0.5 / 3.0)
    return head, hidden, plain


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "llama"])
def test_head_gives_the_models_own_logits(make_model, architecture):
    model = make_model(architecture)
    if architecture == "gemma2":
        model.config.final_logit_softcapping = 0.5  # so small that it bends the logits of a random model
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        expected = model(input_ids=ids).logits[0]
        assert torch.allclose(LogitHead.of(model).logits(hidden), expected, atol=1e-6)


def test_target_probability_and_surprise(case):
    head, hidden, plain = case
    expected = plain.softmax(-1)[:, TARGETS].sum(-1)
    assert torch.allclose(target_probability(head, hidden, TARGETS), expected, atol=1e-6)
    assert torch.allclose(target_surprise(head, hidden, TARGETS), -torch.log(1 - expected), atol=1e-5)


def test_surprise_stays_finite_where_the_target_is_certain():
    head = LogitHead(torch.tensor([[100.0], [0.0], [0.0]]))
    found = target_surprise(head, torch.ones(1, 1), torch.tensor([0]))
    assert float(found) == pytest.approx(100.0 - float(torch.tensor(2.0).log()), rel=1e-6)


def test_gradients_through_recomputed_chunks(case):
    head, hidden, _ = case
    found, expected = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    target_surprise(head, found, TARGETS).sum().backward()
    plain = 3.0 * torch.tanh((expected @ head.weight.T + head.bias) * 0.5 / 3.0)
    (-torch.log(1 - plain.softmax(-1)[:, TARGETS].sum(-1))).sum().backward()
    assert torch.allclose(found.grad, expected.grad, atol=1e-5)


@pytest.mark.parametrize("excluded", [None, TARGETS])
def test_divergence_from_the_start(case, excluded):
    head, hidden, plain = case
    start_hidden = hidden + 0.3
    start_plain = 3.0 * torch.tanh((start_hidden @ head.weight.T + head.bias) * 0.5 / 3.0)
    kept = [i for i in range(20) if excluded is None or i not in excluded.tolist()]
    p, q = start_plain[:, kept].log_softmax(-1), plain[:, kept].log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    variable = hidden.clone().requires_grad_()
    found = divergence_from(head, start_hidden, head, variable, excluded)
    assert torch.allclose(found, expected, atol=1e-5)
    found.sum().backward()
    assert bool(torch.isfinite(variable.grad).all())
    same = divergence_from(head, hidden, head, variable, excluded)
    assert float(same.detach().abs().max()) < 1e-6


def test_risk_weights_have_mean_one_over_eligible_positions(case):
    head, hidden, plain = case
    eligible = torch.tensor([[True, False, True, True, False]])
    probability = plain.softmax(-1)[:, TARGETS].sum(-1)
    weights = risk_weights(head, hidden[None], eligible, TARGETS)
    mean = probability[eligible[0]].mean()
    assert torch.allclose(weights[0], torch.where(eligible[0], probability / mean, 0.0), atol=1e-6)
    assert float(weights[eligible].mean()) == pytest.approx(1.0, rel=1e-5)


def test_the_mask_comes_to_the_last_layers_device(case):
    head, hidden, _ = case
    eligible = torch.tensor([[True, False, True, True, False]])
    expected = risk_weights(head, hidden[None], eligible, TARGETS)
    assert torch.equal(risk_weights(head, hidden[None], elsewhere(eligible), TARGETS), expected)


def test_no_position_is_no_error(case):
    head, hidden, _ = case
    nowhere = torch.zeros(1, 5, dtype=torch.bool)
    assert float(risk_weights(head, hidden[None], nowhere, TARGETS).abs().max()) == 0.0
    variable = hidden.clone().requires_grad_()
    total = target_surprise(head, variable[:0], TARGETS).sum()
    total.backward()
    assert float(total.detach()) == 0.0
