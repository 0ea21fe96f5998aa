"""AbsTopK and GroupMax, which other libraries can make, against their definitions written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qscope_posttrain.sae.activations import AbsTopK, Activation, GroupMax
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

MakeSAE = Callable[..., SparseAutoencoder]


def dense(activation: Activation, pre: Tensor) -> Tensor:
    kept = torch.zeros_like(pre)
    for token, row in enumerate(pre):
        if isinstance(activation, AbsTopK):
            chosen = row.abs().argsort(descending=True)[: activation.k]
        else:
            size = len(row) // activation.k
            chosen = torch.stack([group * size + row[group * size :][:size].argmax() for group in range(activation.k)])
        kept[token, chosen] = row[chosen] if isinstance(activation, AbsTopK) else row[chosen].clamp(min=0)
    return kept


@pytest.mark.parametrize("activation", [AbsTopK(5), GroupMax(8), GroupMax(1), AbsTopK(64), GroupMax(64)], ids=repr)
@pytest.mark.parametrize("tile_tokens", [None, 1, 7])
def test_definition(make_sae: MakeSAE, tmp_path: Path, activation: Activation, tile_tokens: int | None) -> None:
    sae = make_sae(activation=activation)
    x = torch.randn(20, sae.d_model, requires_grad=True)
    values, indices = sae.encode(x, tile_tokens)
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int32)
    assert values.shape == indices.shape == (20, activation.k)  # type: ignore[attr-defined]
    expected = dense(activation, x @ sae.W_enc.T + sae.b_enc)
    found = torch.zeros(20, sae.d_sae).scatter_add(1, indices.long(), values)
    torch.testing.assert_close(found, expected)
    (ours,) = torch.autograd.grad(values.square().sum(), x)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    again = SparseAutoencoder.load(sae.save(tmp_path / "layer3.sae.safetensors"))
    assert again.activation == activation
    assert torch.equal(again.encode(x, tile_tokens)[0], values)


def test_no_tokens(make_sae: MakeSAE) -> None:
    assert make_sae(activation=AbsTopK(5)).encode(torch.empty(0, 16))[0].shape == (0, 5)


def test_faults_are_named(make_sae: MakeSAE) -> None:
    with pytest.raises(ValueError, match="divides the latents into k=5 equal groups, which 64 cannot be"):
        make_sae(activation=GroupMax(5))
    with pytest.raises(ValueError, match="k=65 latents, but the dictionary has only 64"):
        make_sae(activation=AbsTopK(65))
    with pytest.raises(TypeError, match="k must be an integer"):
        GroupMax(2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="certified' is for TopK"):
        make_sae(activation=GroupMax(8)).encode(torch.zeros(1, 16), precision="certified")
    for activation in (GroupMax(8), AbsTopK(4)):
        with pytest.raises(ValueError, match="unknown precision 'fp23'; choose one of model, fp32"):
            make_sae(activation=activation).encode(torch.zeros(1, 16), precision="fp23")
