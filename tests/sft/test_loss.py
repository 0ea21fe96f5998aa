"""The functional loss against the formulas written with loops."""

from __future__ import annotations

import math

import pytest
import torch

from qscope_posttrain.sft.loss import sasft_loss


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    f, alpha = torch.randn(7, 3, generator=generator), torch.randn(7, 3, generator=generator)
    mask = torch.tensor([True, False, True, True, False, True, True])
    return f, alpha, mask


def summed(f, alpha, mask):
    total = 0.0
    for t in range(len(f)):
        for s in range(f.shape[1]):
            if mask[t]:
                total += max(float(f[t, s] - alpha[t, s]), 0.0)
    return total


def test_token_mean_averages_over_features_and_tokens(case):
    f, alpha, mask = case
    assert float(sasft_loss(f, alpha, mask)) == pytest.approx(summed(f, alpha, mask) / (3 * 5))
    assert float(sasft_loss(f, alpha, mask, num_tokens=40)) == pytest.approx(summed(f, alpha, mask) / (3 * 40))


def test_paper_sums_over_features(case):
    f, alpha, mask = case
    assert float(sasft_loss(f, alpha, mask, "paper")) == pytest.approx(summed(f, alpha, mask) / 5)


def test_official_adds_one_to_the_denominator(case):
    f, alpha, mask = case
    loss = sasft_loss(f, alpha, mask, "official", num_tokens=6)
    assert float(loss) == pytest.approx(summed(f, alpha, mask) / (3 * 6 + 1))


@pytest.mark.parametrize("normalization", ["token_mean", "paper", "official"])
def test_nothing_to_penalise_is_exactly_zero_with_a_graph(case, normalization):
    f, alpha, mask = case
    f = f.clone().requires_grad_()
    loss = sasft_loss(f, alpha, torch.zeros_like(mask), normalization)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert float(f.grad.abs().max()) == 0.0


def test_a_masked_nan_does_not_spread(case):
    f, alpha, mask = case
    f = f.clone()
    f[1] = math.nan
    f.requires_grad_()
    loss = sasft_loss(f, alpha, mask)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert bool(torch.isfinite(f.grad).all())


def test_gradient_against_finite_differences(case):
    f, alpha, mask = (tensor.double() if tensor.is_floating_point() else tensor for tensor in case)
    f = f.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sasft_loss(x, alpha, mask, "paper"), (f,))


def test_errors(case):
    f, alpha, mask = case
    with pytest.raises(ValueError, match="one entry per token"):
        sasft_loss(f, alpha, mask[:-1])
    with pytest.raises(ValueError, match="token_mean, paper, official"):
        sasft_loss(f, alpha, mask, "mean")
