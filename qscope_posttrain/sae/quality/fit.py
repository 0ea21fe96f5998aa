"""Reconstruct a sample with an SAE as it is and under changes that would repair a mistake: scale, b_dec, layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qscope_posttrain.sae.autoencoder import SparseAutoencoder

SCALE_TOKENS = 256
"""Tokens on which scales of the input are tried: 12 to 18 times each."""

_OCTAVES = range(-6, 7)
_QUARTERS = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """Residual vectors and their reconstruction by an SAE."""

    x: Tensor
    """[tokens, d_model] float32"""
    x_hat: Tensor
    """[tokens, d_model] float32, with b_dec"""
    values: Tensor
    indices: Tensor

    @classmethod
    def of(cls, sae: SparseAutoencoder, x: Tensor, scale: float = 1.0, shift: float = 0.0) -> Reconstructed:
        """Encode `scale` x + `shift` b_dec and decode; x_hat is divided by `scale` again."""
        x = x.to(sae.device).float()
        values, indices = sae.encode((x * scale + shift * sae.b_dec.float()).to(sae.dtype))
        return cls(x, sae.decode(values, indices).float() / scale, values, indices)

    def unexplained(self, b_dec: Tensor, best_scale: bool = False) -> tuple[float, float]:
        """(FVU, s): with `best_scale`, x_hat is b_dec + s (x_hat - b_dec) with the s that makes the FVU smallest."""
        direction = self.x_hat - b_dec
        along = float(((self.x - b_dec) * direction).sum(dtype=torch.float64))
        power, error = float(squares(direction).sum()), float(squares(self.x - self.x_hat).sum())
        scale = along / power if best_scale and power > 0 else 1.0
        variance = (self.x - self.x.mean(dim=0)).square().sum(dtype=torch.float64)
        # error is |r - d|^2 for r = x - b_dec and d = x_hat - b_dec; |r - s d|^2 differs from it by this
        error += (scale**2 - 1) * power - 2 * (scale - 1) * along
        return error / max(float(variance), 1e-300), scale

    @property
    def fired(self) -> Tensor:
        """[tokens] int64: number of latents that are not zero (below zero only where an activation keeps signs)."""
        return (self.values != 0).sum(dim=1)


@dataclass(frozen=True)
class Fit:
    """Unexplained shares of the variance (FVU) of a sample, under changes that would repair a mistake."""

    fvu: float
    """Without a change."""
    output_scale: float
    """Factor of the decoded part, x_hat - b_dec, that makes the FVU smallest."""
    fvu_at_output_scale: float
    input_scale: float
    """Factor of x before encoding (undone after decoding) that makes the FVU smallest, from 2^-6 to 2^6."""
    fvu_at_input_scale: float
    fvu_subtracting_b_dec: float
    """Fed with x - b_dec."""
    fvu_adding_b_dec: float
    """Fed with x + b_dec."""
    l0: float
    """Firing latents per token, without a change."""
    l0_at_input_scale: float
    chance: float
    """FVU of an SAE of this width and sparsity on unrelated data: at the best scales, on residual vectors whose
    deviations from their mean had their coordinates shuffled and their signs flipped at random."""
    layers: Mapping[int, float]
    """Layer -> FVU there at the best output scale, for the layer itself and its neighbors."""
    alignment: float
    """Mean cosine between a latent's encoder row and its direction: near 0 if the two do not belong together."""


@torch.no_grad()
def best_fit(sae: SparseAutoencoder, layer: int, rows: Mapping[int, Tensor]) -> Fit:
    """`rows`: layer -> residual vectors [tokens, d_model], for `layer` and any neighbors."""
    b_dec, x = sae.b_dec.float(), rows[layer]

    def scaled(states: Tensor, scale: float = 1.0) -> tuple[float, float]:
        return Reconstructed.of(sae, states, scale).unexplained(b_dec, best_scale=True)

    own, input_scale = Reconstructed.of(sae, x), _best_input_scale(sae, x)
    at_best, output_scale = own.unexplained(b_dec, best_scale=True)
    rescaled, unrelated = Reconstructed.of(sae, x, input_scale), _unrelated(x)
    return Fit(
        fvu=own.unexplained(b_dec)[0],
        output_scale=output_scale,
        fvu_at_output_scale=at_best,
        input_scale=input_scale,
        fvu_at_input_scale=rescaled.unexplained(b_dec)[0],
        fvu_subtracting_b_dec=Reconstructed.of(sae, x, shift=-1.0).unexplained(b_dec)[0],
        fvu_adding_b_dec=Reconstructed.of(sae, x, shift=1.0).unexplained(b_dec)[0],
        l0=float(own.fired.float().mean()),
        l0_at_input_scale=float(rescaled.fired.float().mean()),
        chance=min(scaled(unrelated, scale)[0] for scale in (1.0, input_scale)),
        layers={number: scaled(states)[0] for number, states in sorted(rows.items())},
        alignment=float(torch.nn.functional.cosine_similarity(sae.W_enc.float(), sae.W_dec.float(), dim=1).mean()),
    )


def squares(rows: Tensor) -> Tensor:
    """[tokens] float64: squared norms."""
    return rows.square().sum(dim=1, dtype=torch.float64)


def _unrelated(x: Tensor) -> Tensor:
    """x [tokens, d_model] with the same mean and spectrum, in directions that no SAE was trained on."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(x.shape[1], generator=generator).to(x.device)
    signs = (2.0 * torch.randint(2, (x.shape[1],), generator=generator) - 1).to(x.device)
    mean = x.float().mean(dim=0)
    return mean + (x.float() - mean)[:, order] * signs


def _best_input_scale(sae: SparseAutoencoder, x: Tensor) -> float:
    """The factor of x with the smallest FVU, searched by octaves, then by quarters of an octave around the best."""
    x = x[torch.linspace(0, len(x) - 1, min(len(x), SCALE_TOKENS)).long().to(x.device)]
    b_dec = sae.b_dec.float()

    def unexplained(octave: float) -> float:
        return Reconstructed.of(sae, x, 2.0**octave).unexplained(b_dec)[0]

    tried = {float(octave): unexplained(octave) for octave in _OCTAVES}
    best = min(tried, key=lambda octave: tried[octave])
    if best != 0:
        tried |= {best + quarter: unexplained(best + quarter) for quarter in _QUARTERS}
        best = min(tried, key=lambda octave: tried[octave])
    return float(2.0**best)
