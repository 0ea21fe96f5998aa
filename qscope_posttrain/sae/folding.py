"""What the formats do around the two matrices, folded into them, so that nothing of it is left at run time.

A stored SAE computes, with the quirks that some format has,

    z     = a * W (s x - [b_dec]) + b           s: input scale; [b_dec]: subtracted or not; a: per feature, on W only
    z'    = u * n * z                           n: norm of the decoder row, or 1; u: unit of the activations
    f'    = activation(z')
    x_hat = (sum_j f'_j D_j / (u n_j) + b_dec) / t        D: decoder rows; t: output scale

which is the canonical form of `autoencoder` with

    encoder = u n a s W      bias = u n (b - a W [b_dec])      decoder = D / (u n t)      b_dec' = b_dec / t
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Fold:
    """The quirks of one stored SAE. The defaults change nothing."""

    input_scale: float = 1.0
    """s: the encoder was trained on s * x."""
    output_scale: float = 1.0
    """t: the decoder yields t * x."""
    activation_scale: float = 1.0
    """u: an activation of 1 in the stored units is u here."""
    subtract_b_dec: bool = False
    """The encoder sees s * x - b_dec."""
    unit_decoder: bool = False
    """Activations are multiplied by the norm of their decoder row before anything is selected."""
    encoder_scale: Tensor | None = None
    """a, [d_sae]"""
    decoder_scale: Tensor | None = None
    """Factor on each decoder row before all this, [d_sae]."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some features of a dictionary: encoder [F, d_model], bias [F], decoder [F, d_model]."""

    encoder: Tensor
    bias: Tensor
    decoder: Tensor


def fold_rows(fold: Fold, rows: Rows, b_dec: Tensor, feature_ids: Tensor | slice) -> Rows:
    """`rows` of the features `feature_ids` in canonical units. `b_dec` [d_model] is the stored one.

    Every row is folded on its own, so that it does not matter which others are. Sums are taken in float64. The tensors
    of `rows` may be overwritten.
    """
    encoder, bias, decoder = rows.encoder, rows.bias, rows.decoder
    if fold.encoder_scale is not None:
        encoder = encoder.mul_(fold.encoder_scale[feature_ids].to(encoder.dtype).unsqueeze(1))
    if fold.decoder_scale is not None:
        decoder = decoder.mul_(fold.decoder_scale[feature_ids].to(decoder.dtype).unsqueeze(1))
    if fold.subtract_b_dec:
        bias = (bias.double() - (encoder.double() * b_dec.double()).sum(dim=1)).to(bias.dtype)
    if fold.unit_decoder:
        norms = decoder.double().square().sum(dim=1).sqrt()
        encoder = encoder.mul_(norms.to(encoder.dtype).unsqueeze(1))
        bias = (bias.double() * norms).to(bias.dtype)
        decoder = decoder.div_(norms.masked_fill(norms == 0, 1.0).to(decoder.dtype).unsqueeze(1))
    return Rows(
        _scaled(encoder, fold.activation_scale * fold.input_scale),
        _scaled(bias, fold.activation_scale),
        _scaled(decoder, 1 / (fold.activation_scale * fold.output_scale)),
    )


def fold_b_dec(fold: Fold, b_dec: Tensor) -> Tensor:
    """The decoder bias in canonical units."""
    return b_dec / fold.output_scale if fold.output_scale != 1 else b_dec


def compute_dtype(view: Tensor) -> torch.dtype:
    """Rows are folded in float32, or in float64 where the file holds that."""
    return torch.promote_types(torch.float32, view.dtype)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor.mul_(factor)
