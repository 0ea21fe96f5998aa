"""Would an SAE fit better in other units, or on a neighbouring layer? Tried on a sample of residual vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qscope_posttrain.features.sae_sums import Reconstructed
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

SCALE_TOKENS = 256
"""Tokens on which scales of the input are tried: 12 to 18 times each."""

_OCTAVES = range(-6, 7)
_QUARTERS = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Fit:
    """Unexplained shares of the variance (FVU) of a sample, under changes that would repair a mistake."""

    fvu: float
    """As it is."""
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
    """Firing latents a token, as it is."""
    l0_at_input_scale: float
    chance: float
    """What an SAE of this width and sparsity explains of any data: FVU, at the best scales, on residual vectors whose
    deviations from their mean had their coordinates shuffled and their signs flipped at random."""
    layers: Mapping[int, float]
    """Layer -> FVU there at the best output scale, for the layer itself and its neighbours."""
    alignment: float
    """Mean cosine between a latent's encoder row and its direction: near 0 if the two do not belong together."""


@torch.no_grad()
def best_fit(sae: SparseAutoencoder, layer: int, rows: Mapping[int, Tensor]) -> Fit:
    """`rows`: layer -> residual vectors [tokens, d_model], for `layer` and any neighbours."""
    b_dec = sae.b_dec.float()
    own = Reconstructed.of(sae, rows[layer])
    fvu, _ = own.unexplained(b_dec)
    at_best, output_scale = own.unexplained(b_dec, best_scale=True)
    input_scale = _best_input_scale(sae, rows[layer])
    rescaled = Reconstructed.of(sae, rows[layer], input_scale)
    unrelated = _unrelated(rows[layer])
    chances = [
        Reconstructed.of(sae, unrelated, scale).unexplained(b_dec, best_scale=True) for scale in (1.0, input_scale)
    ]
    return Fit(
        fvu=fvu,
        output_scale=output_scale,
        fvu_at_output_scale=at_best,
        input_scale=input_scale,
        fvu_at_input_scale=rescaled.unexplained(b_dec)[0],
        fvu_subtracting_b_dec=Reconstructed.of(sae, rows[layer], shift=-1.0).unexplained(b_dec)[0],
        fvu_adding_b_dec=Reconstructed.of(sae, rows[layer], shift=1.0).unexplained(b_dec)[0],
        l0=float(own.fired.float().mean()),
        l0_at_input_scale=float(rescaled.fired.float().mean()),
        chance=min(value for value, _ in chances),
        layers={
            number: Reconstructed.of(sae, x).unexplained(b_dec, best_scale=True)[0]
            for number, x in sorted(rows.items())
        },
        alignment=float(torch.nn.functional.cosine_similarity(sae.W_enc.float(), sae.W_dec.float(), dim=1).mean()),
    )


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
