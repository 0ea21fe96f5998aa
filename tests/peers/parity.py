"""What every comparison with another library has in common."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qscope_posttrain.sae.autoencoder import SparseAutoencoder

D_MODEL, D_SAE, TOKENS = 24, 96, 64


def randomise(module: torch.nn.Module) -> None:
    """Weights as after training: nothing zero, nothing of unit norm, biases that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            scale = 0.3 if parameter.ndim == 2 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if "threshold" in name:
                parameter.abs_()


def tokens(scale: float = 2.0) -> Tensor:
    return scale * torch.randn(TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1)) + 0.3


def dense(values: Tensor, indices: Tensor, d_sae: int = D_SAE) -> Tensor:
    return torch.zeros(values.shape[0], d_sae).scatter_add(1, indices.long(), values)


def assert_same(sae: SparseAutoencoder, acts: Tensor, reconstruction: Tensor, x: Tensor) -> None:
    """`sae` encodes and decodes `x` to the library's own dense activations and reconstruction."""
    values, indices = sae.encode(x)
    assert (acts > 0).any(), "an SAE that never fires proves nothing"
    assert (acts == 0).any()
    torch.testing.assert_close(dense(values, indices), acts.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(values, indices), reconstruction.detach(), rtol=1e-5, atol=1e-5)


def assert_rows_agree(path: Path, sae: SparseAutoencoder) -> None:
    """The rows alone are, bit for bit, those of the whole dictionary."""
    ids = [0, 95, 17, 17]
    rows = SparseAutoencoder.rows(path, ids)
    assert torch.equal(rows.encoder, sae.W_enc[ids])
    assert torch.equal(rows.encoder_bias, sae.b_enc[ids])
    assert torch.equal(rows.decoder, sae.W_dec[ids])
