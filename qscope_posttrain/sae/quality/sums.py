"""What a text adds to the measures of an SAE: sums over its tokens, from which ratios and their intervals are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qscope_posttrain.sae.autoencoder import SparseAutoencoder

COLUMNS = (
    "tokens",
    "outliers",
    "error",  # |x - x_hat|^2
    "error_without_b_dec",  # |x - (x_hat - b_dec)|^2
    "variance",  # |x - reference|^2, the reference being near the mean
    "firing",
    "cosine",
    "norm",
    "reconstruction_norm",
    "predictions",
    "clean",  # the four losses, each a sum of -log P(next token)
    "spliced",
    "mean",
    "zero",
)
"""One sum a text each, over the tokens that count and are no norm outliers; the losses over all that predict."""

LOSSES = ("clean", "spliced", "mean", "zero")


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """Residual vectors and what an SAE makes of them."""

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
        power, error = float(_squares(direction).sum()), float(_squares(self.x - self.x_hat).sum())
        scale = along / power if best_scale and power > 0 else 1.0
        variance = (self.x - self.x.mean(dim=0)).square().sum(dtype=torch.float64)
        # error is |r - d|^2 for r = x - b_dec and d = x_hat - b_dec; |r - s d|^2 differs from it by this
        error += (scale**2 - 1) * power - 2 * (scale - 1) * along
        return error / max(float(variance), 1e-300), scale

    def columns(self, b_dec: Tensor, reference: Tensor) -> Tensor:
        """[tokens, 9] float64: the columns from "tokens" to "reconstruction_norm", with 0 for "outliers"."""
        norm, norm_hat = (torch.linalg.vector_norm(part, dim=1) for part in (self.x, self.x_hat))
        columns = (
            torch.ones_like(norm),
            torch.zeros_like(norm),
            _squares(self.x - self.x_hat),
            _squares(self.x - (self.x_hat - b_dec)),
            _squares(self.x - reference),
            self.fired,
            torch.nn.functional.cosine_similarity(self.x, self.x_hat, dim=1),
            norm,
            norm_hat,
        )
        return torch.stack([column.double() for column in columns], dim=1)

    @property
    def fired(self) -> Tensor:
        """[tokens] int64: latents that are not zero (below zero only where an activation keeps signs)."""
        return (self.values != 0).sum(dim=1)


@dataclass(frozen=True, eq=False)
class QualitySums:
    """Everything that the pass adds up, on the CPU."""

    texts: Tensor
    """[texts, columns] float64"""
    deviation: Tensor
    """[d_model] float64: sum of x - reference"""
    fired: Tensor
    """[d_sae] int64: tokens on which each latent fired"""
    l0: Tensor
    """[d_sae + 1] int64: tokens by the number of latents that fired"""

    @classmethod
    def zeros(cls, texts: int, sae: SparseAutoencoder) -> QualitySums:
        return cls(
            torch.zeros(texts, len(COLUMNS), dtype=torch.float64),
            torch.zeros(sae.d_model, dtype=torch.float64),
            torch.zeros(sae.d_sae, dtype=torch.int64),
            torch.zeros(sae.d_sae + 1, dtype=torch.int64),
        )

    def add_tokens(self, owners: Tensor, made: Reconstructed, b_dec: Tensor, reference: Tensor) -> None:
        """Add tokens that are no outliers; `owners` [tokens] are the texts that they belong to."""
        columns = made.columns(b_dec, reference).cpu()
        self.texts[:, : columns.shape[1]].index_add_(0, owners, columns)
        self.deviation.add_((made.x - reference).sum(dim=0, dtype=torch.float64).cpu())
        active = made.indices.long()[made.values != 0]
        self.fired.add_(torch.bincount(active, minlength=len(self.fired)).cpu())
        self.l0.add_(torch.bincount(made.fired, minlength=len(self.l0)).cpu())

    def add(self, column: str, owners: Tensor, amounts: Tensor) -> None:
        """Add `amounts` [n] to one column of the texts `owners` [n]."""
        self.texts[:, COLUMNS.index(column)].index_add_(0, owners, amounts.double().cpu())

    def rows(self) -> dict[str, NDArray[np.float64]]:
        """The columns by name, each [texts]. "variance" is around the exact mean of all tokens in total."""
        named = {name: self.texts[:, place].numpy().copy() for place, name in enumerate(COLUMNS)}
        tokens, total = named["tokens"].sum(), named["variance"].sum()
        exact = total - float(self.deviation.square().sum()) / max(tokens, 1.0)
        named["variance"] *= exact / total if total > 0 else 1.0
        return named

    def l0_quartiles(self) -> tuple[int, int, int]:
        """Smallest numbers of firing latents that a quarter, half and three quarters of the tokens do not exceed."""
        below = self.l0.cumsum(0)
        first, second, third = (int((below >= share * int(below[-1])).nonzero()[0]) for share in (0.25, 0.5, 0.75))
        return first, second, third


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1, dtype=torch.float64)


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
