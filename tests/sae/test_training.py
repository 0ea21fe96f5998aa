from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.training import (
    TopKTrainingConfig,
    _SparseDecode,
    _top_k_indices,
    explained_variance,
    train_saes,
)

QUICK = TopKTrainingConfig(width=96, k=6, steps=400, batch_tokens=256, learning_rate=1e-2, dead_after=20)


@pytest.fixture(scope="module")
def sparse_world() -> tuple[Tensor, Tensor]:
    """(48 unit directions [48, 24], 6,000 tokens that are sums of about four of them, off centre, in large units)."""
    generator = torch.Generator().manual_seed(1)
    directions = F.normalize(torch.randn(48, 24, generator=generator), dim=1)
    present = torch.rand(6000, 48, generator=generator) < 4 / 48
    code = present * (1 + torch.rand(6000, 48, generator=generator))
    return directions, 30 * (code @ directions) + 50 * torch.randn(24, generator=generator)


@pytest.fixture(scope="module")
def trained(sparse_world: tuple[Tensor, Tensor]) -> SparseAutoencoder:
    return train_saes({2: sparse_world[1][:5000]}, QUICK)[2]


def test_held_out_tokens_are_explained_and_directions_found(
    trained: SparseAutoencoder, sparse_world: tuple[Tensor, Tensor]
) -> None:
    directions, x = sparse_world
    assert explained_variance(trained, x[5000:]) > 0.8
    best = (directions @ trained.W_dec.T).amax(dim=1)
    assert best.median() > 0.9, "half of the true directions have a decoder row within 26 degrees"


def test_result_is_canonical(trained: SparseAutoencoder) -> None:
    assert trained.activation == TopK(6)
    assert trained.layer == 2
    assert (trained.d_sae, trained.d_model) == (96, 24)
    torch.testing.assert_close(trained.W_dec.norm(dim=1), torch.ones(96))
    assert not any(t.requires_grad for t in (trained.W_enc, trained.b_enc, trained.W_dec, trained.b_dec))


def test_same_seed_same_dictionary_whatever_else_is_trained(
    trained: SparseAutoencoder, sparse_world: tuple[Tensor, Tensor]
) -> None:
    x = sparse_world[1][:5000]
    torch.manual_seed(99)
    again = train_saes({7: -x, 2: x}, QUICK)[2]
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(again, name), getattr(trained, name))
    other = train_saes({2: x}, TopKTrainingConfig(**{**vars(QUICK), "seed": 1, "steps": 3}))[2]
    assert not torch.equal(other.W_enc, train_saes({2: x}, TopKTrainingConfig(**{**vars(QUICK), "steps": 3}))[2].W_enc)


def test_units_are_folded(sparse_world: tuple[Tensor, Tensor]) -> None:
    """Training on c x gives the same dictionary in units c times as large: f(c x) = c f(x), x_hat(c x) = c x_hat(x)."""
    x = sparse_world[1]
    config = TopKTrainingConfig(width=48, k=4, steps=20, batch_tokens=256)
    small, large = train_saes({0: x}, config)[0], train_saes({0: 64 * x}, config)[0]
    torch.testing.assert_close(large.W_enc, small.W_enc)
    torch.testing.assert_close(large.b_enc, 64 * small.b_enc)
    torch.testing.assert_close(large.b_dec, 64 * small.b_dec)
    values, indices = small.encode(x[:50])
    large_values, large_indices = large.encode(64 * x[:50])
    assert torch.equal(indices, large_indices)
    torch.testing.assert_close(large_values, 64 * values)


def test_start_is_the_tied_recipe(sparse_world: tuple[Tensor, Tensor]) -> None:
    """At a vanishing rate the result is the start: tied unit rows, b the mean of the tokens."""
    x = sparse_world[1]
    sae = train_saes({0: x}, TopKTrainingConfig(width=48, k=4, steps=1, learning_rate=1e-12))[0]
    torch.testing.assert_close(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.b_dec, x.mean(dim=0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sae.b_enc, -sae.W_enc @ sae.b_dec, rtol=1e-4, atol=1e-2)


def test_auxk_revives_silent_latents() -> None:
    """Directions of very different size: without AuxK, latents die that could explain the small ones."""
    generator = torch.Generator().manual_seed(3)
    directions = F.normalize(torch.randn(64, 16, generator=generator), dim=1)
    size = torch.logspace(0, -1, 64)
    x = ((torch.rand(4000, 64, generator=generator) < 0.05) * size) @ directions + 3 * torch.randn(
        16, generator=generator
    )

    def silent(auxk_weight: float) -> int:
        config = TopKTrainingConfig(
            width=256, k=4, steps=250, batch_tokens=256, dead_after=20, auxk_weight=auxk_weight, learning_rate=1e-2
        )
        values, indices = train_saes({0: x}, config)[0].encode(x)
        return 256 - indices[values > 0].unique().numel()

    without, with_auxk = silent(0.0), silent(1.0)
    assert without >= 10, "the case has dead latents to begin with"
    assert with_auxk < 0.8 * without


def test_bfloat16_activations_train(sparse_world: tuple[Tensor, Tensor]) -> None:
    sae = train_saes({0: sparse_world[1].bfloat16()}, TopKTrainingConfig(width=48, k=4, steps=5))[0]
    assert sae.dtype == torch.float32


def test_explained_variance_against_its_definition(
    trained: SparseAutoencoder, sparse_world: tuple[Tensor, Tensor]
) -> None:
    x = sparse_world[1][:4500]
    x_hat = trained.decode(*trained.encode(x))
    expected = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert explained_variance(trained, x) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        explained_variance(trained, x[:1])


def test_sparse_decode_gradient() -> None:
    indices = torch.stack([torch.randperm(12)[:3] for _ in range(5)])
    values = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    W_dec = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, W: _SparseDecode.apply(v, indices, W), (values, W_dec))


@pytest.mark.parametrize("k", [1, 7, 20])
def test_fast_top_k_is_top_k(k: int) -> None:
    pre = torch.randn(50, 20)
    assert torch.equal(_top_k_indices(pre, k).sort(dim=1).values, pre.topk(k, dim=1).indices.sort(dim=1).values)


def test_learning_rate_schedule() -> None:
    config = TopKTrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, decay_start=0.7)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:71] == [pytest.approx(1.0)] * 62
    assert rates[85] == pytest.approx(0.02 + 0.98 * 0.5)
    assert rates[99] == pytest.approx(0.02 + 0.98 / 30)
    assert TopKTrainingConfig(warmup_steps=0, decay_start=1.0).rate(0) == 3e-3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"k": 0}, "k must be an integer from 1, got 0"),
        ({"steps": 1.5}, "steps must be an integer from 1"),
        ({"width": 0}, "width must be an integer from 1, or None"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"decay_start": 1.5}, "decay_start must be a share"),
        ({"auxk_weight": -1.0}, "auxk_weight must be 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
    ],
)
def test_bad_settings(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TopKTrainingConfig(**settings)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.randn(2, 3, 4), r"activations of layer 1 has shape \[2, 3, 4\]"),
        (torch.randn(0, 8), r"shape \[0, 8\]"),
        (torch.ones(9, 8), "are all equal"),
        (torch.zeros(9, 8), "are all equal"),
        (torch.full((9, 8), math.inf), "holds NaN or infinite"),
        (torch.ones(9, 8, dtype=torch.int64), "dtype int64"),
        (torch.randn(9, 2), "k=32 latents are to fire, but the dictionary would have only 16"),
    ],
)
def test_bad_activations(x: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        train_saes({1: x})
