from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.testbed.models import explained_variance
from qscope_posttrain.sae.activations import BatchTopK, JumpReLU, TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.training import SAETrainingConfig, train_saes
from qscope_posttrain.sae.training.parameters import calibrate, geometric_median
from qscope_posttrain.sae.training.update import LayerTraining

QUICK = SAETrainingConfig(width=96, k=6, steps=250, batch_tokens=256, learning_rate=1e-2, dead_after=20)


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
    other = train_saes({2: x}, SAETrainingConfig(**{**vars(QUICK), "seed": 1, "steps": 3}))[2]
    assert not torch.equal(other.W_enc, train_saes({2: x}, SAETrainingConfig(**{**vars(QUICK), "steps": 3}))[2].W_enc)


def test_units_are_folded(sparse_world: tuple[Tensor, Tensor]) -> None:
    """Training on c x gives the same dictionary in units c times as large: f(c x) = c f(x), x_hat(c x) = c x_hat(x)."""
    x = sparse_world[1]
    config = SAETrainingConfig(width=48, k=4, steps=20, batch_tokens=256)
    small, large = train_saes({0: x}, config)[0], train_saes({0: 64 * x}, config)[0]
    torch.testing.assert_close(large.W_enc, small.W_enc)
    torch.testing.assert_close(large.b_enc, 64 * small.b_enc)
    torch.testing.assert_close(large.b_dec, 64 * small.b_dec)
    values, indices = small.encode(x[:50])
    large_values, large_indices = large.encode(64 * x[:50])
    assert torch.equal(indices, large_indices)
    torch.testing.assert_close(large_values, 64 * values)


def test_start_is_tied_centred_and_scaled(sparse_world: tuple[Tensor, Tensor]) -> None:
    """At a vanishing rate the result is the start: b_dec the geometric median, the encoder one factor of the decoder,
    which makes the reconstruction of the first batch best."""
    x = sparse_world[1]
    config = SAETrainingConfig(width=48, k=4, steps=1, batch_tokens=len(x), learning_rate=1e-12)
    sae = train_saes({0: x}, config)[0]
    torch.testing.assert_close(sae.b_dec, geometric_median(x).float(), rtol=1e-4, atol=1e-3)
    factor = sae.W_enc.norm(dim=1)
    torch.testing.assert_close(factor, factor[0].expand(48))
    torch.testing.assert_close(sae.W_enc, factor[0] * sae.W_dec)
    torch.testing.assert_close(sae.b_enc, -sae.W_enc @ sae.b_dec, rtol=1e-4, atol=1e-2)
    best = explained_variance(sae, x)
    for other in (0.95, 1.05):
        scaled = dataclasses.replace(sae, W_enc=other * sae.W_enc, b_enc=other * sae.b_enc)
        assert explained_variance(scaled, x) < best


@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu"])
def test_other_architectures_reach_k_and_explain(architecture: str, sparse_world: tuple[Tensor, Tensor]) -> None:
    x = sparse_world[1]
    config = dataclasses.replace(QUICK, architecture=architecture, k=4)
    sae = train_saes({2: x[:5000]}, config)[2]
    values, _ = sae.encode(x[5000:])
    assert float((values > 0).float().sum(dim=1).mean()) == pytest.approx(4, rel=0.15)
    assert explained_variance(sae, x[5000:]) > 0.75
    assert type(sae.activation) is {"batch_topk": BatchTopK, "jumprelu": JumpReLU}[architecture]


@pytest.mark.parametrize(("auxk_weight", "revived"), [(0.0, range(1)), (1 / 32, range(40, 65))])
def test_auxk_revives_dead_latents(auxk_weight: float, revived: range) -> None:
    """Half of the latents are pushed out of the k largest after the first update: only AuxK brings them back."""
    generator = torch.Generator().manual_seed(3)
    directions = F.normalize(torch.randn(96, 16, generator=generator), dim=1)
    present = torch.rand(6000, 96, generator=generator) < 3 / 96
    x = (present * (1 + torch.rand(6000, 96, generator=generator))) @ directions
    config = SAETrainingConfig(
        width=128, k=3, steps=250, decay_start=1.0, auxk_weight=auxk_weight, auxk_every=1, dead_after=20
    )
    training = LayerTraining(0, calibrate(0, x), config)
    for step in range(config.steps):
        metrics = training.update(x[torch.randint(0, 6000, (256,), generator=generator)], 256, step)
        if step == 0:
            with torch.no_grad():
                training.parameters.b_enc[:64] -= 2
        if step == 25:
            assert float(metrics.dead) == pytest.approx(0.5, abs=0.02)
            assert bool(metrics.auxk.isnan()) == (auxk_weight == 0)
    values, indices = training.finished().encode(x)
    assert int((indices[values > 0].unique() < 64).sum()) in revived


def test_bfloat16_activations_train(sparse_world: tuple[Tensor, Tensor]) -> None:
    sae = train_saes({0: sparse_world[1].bfloat16()}, SAETrainingConfig(width=48, k=4, steps=5))[0]
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
