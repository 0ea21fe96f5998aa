"""An SAE as a file stores it, and the folding of its format's quirks into the two matrices.

A stored SAE computes, with the quirks that some format has,

    z     = a * W (s x - [b_dec]) + b           s: input scale; [b_dec]: subtracted or not; a: per feature, on W only
    z'    = u * n * z                           n: norm of the decoder row, or 1; u: unit of the activations
    f'    = activation(z')
    x_hat = (sum_j f'_j D_j / (u n_j) + b_dec) / t        D: decoder rows; t: output scale

which is the canonical form of `autoencoder` with

    encoder = u n a s W      bias = u n (b - a W [b_dec])      decoder = D / (u n t)      b_dec' = b_dec / t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.sae.activations import Activation, JumpReLU
from qscope_posttrain.sae.source import LocatedFile, SAESource
from qscope_posttrain.sae.weights_file import WeightsFile


@dataclass(frozen=True, eq=False)
class Fold:
    """The quirks of one stored SAE. The defaults change nothing."""

    input_scale: float = 1.0  # s: the encoder was trained on s * x
    output_scale: float = 1.0  # t: the decoder yields t * x
    activation_scale: float = 1.0  # u: an activation of 1 in the stored units is u here
    subtract_b_dec: bool = False  # The encoder is fed s * x - b_dec
    unit_decoder: bool = False  # Activations are multiplied by their decoder row's norm before the activation
    encoder_scale: Tensor | None = None  # a, [d_sae]
    decoder_scale: Tensor | None = None  # Factor on each decoder row before all this, [d_sae]


@dataclass(frozen=True)
class Layout:
    """The tensors of a format, or of one of its variants."""

    format: str
    names: tuple[str, str, str, str]  # Of encoder, its bias, decoder, its bias
    features_in: str  # "rows" or "columns" of the encoder and of the decoder: "rows, columns"
    more: tuple[str, ...] = ()  # Further tensors
    optional: tuple[str, ...] = ()  # Those that may also be there, or of `names` be missing

    @property
    def required(self) -> set[str]:
        return {*self.names, *self.more} - {*self.optional}

    def check(self, weights: WeightsFile) -> None:
        """ValueError unless the file holds these tensors and no other."""
        weights.only(self.required, self.optional)


@dataclass(frozen=True)
class StoredSAE:
    """An SAE on disk, in canonical orientation: structure checked, values not yet read."""

    located: LocatedFile
    format: str
    W_enc: Tensor  # [d_sae, d_model]; a transposed view where the file stores the features as columns
    b_enc: Tensor  # [d_sae]
    W_dec: Tensor  # [d_sae, d_model]; a transposed view where the file stores the directions as columns
    b_dec: Tensor  # [d_model]
    memory_mapped: bool  # The tensors are pages of the file, never written to: they may be released after reading
    fold: Fold = field(default_factory=Fold)  # The quirks to fold into these four
    activation: Activation | None = None  # In units after folding; None where the file does not state it
    layer: int | None = None  # Layer stated in the file or its settings, else by its place or the caller
    origin: SAESource | None = None

    @property
    def path(self) -> Path:
        return self.located.path

    @property
    def d_sae(self) -> int:
        return self.b_enc.shape[0]

    @property
    def d_model(self) -> int:
        return self.b_dec.shape[0]

    def source(self, sha256: str | None = None) -> SAESource:
        """The origin of this SAE, to be kept with it."""
        return self.located.describe(self.format, sha256, self.origin)


def read_stored(
    weights: WeightsFile,
    located: LocatedFile,
    layout: Layout,
    d_sae: int | None = None,
    d_model: int | None = None,
    **more: Any,
) -> StoredSAE:
    """The SAE in a file; ValueError for tensors that are missing or do not belong together.

    `d_sae` and `d_model` are those that the settings state, by default the lengths of the biases; `more` are further
    fields of StoredSAE.
    """
    encoder, b_enc, decoder, b_dec = layout.names
    bias = weights.tensor(b_enc, d_sae)
    absent = d_model and b_dec in layout.optional and b_dec not in weights
    shift = torch.zeros(d_model) if absent else weights.tensor(b_dec, d_model)  # type: ignore[arg-type]
    shape = bias.shape[0], shift.shape[0]
    encoder_in, decoder_in = layout.features_in.split(", ")
    W_enc, W_dec = weights.matrix(encoder, *shape, encoder_in), weights.matrix(decoder, *shape, decoder_in)
    return StoredSAE(located, layout.format, W_enc, bias, W_dec, shift, weights.memory_mapped, **more)


def gated(weights: WeightsFile, b_enc: str, b_gate: str) -> tuple[JumpReLU, Tensor]:
    """(activation, factor on the encoder's rows) of a gated SAE, whose gate is a threshold on its magnitude.

    The gate opens where W x + b_gate > 0; the magnitude is exp(r_mag) W x + b_enc, which then exceeds
    b_enc - exp(r_mag) b_gate.
    """
    bias = weights.tensor(b_enc, None)
    gain = weights.tensor("r_mag", len(bias)).float().exp()
    return JumpReLU(bias.float() - gain * weights.tensor(b_gate, len(bias)).float()), gain


def fold_rows(
    fold: Fold, encoder: Tensor, bias: Tensor, decoder: Tensor, b_dec: Tensor, feature_ids: Tensor | slice
) -> tuple[Tensor, Tensor, Tensor]:
    """(encoder [F, d_model], bias [F], decoder [F, d_model]) of the features `feature_ids` in canonical units.

    `b_dec` [d_model] is the stored one. Every row is folded on its own, so that it does not matter which others are
    given. Sums are taken in float64. The given rows may be overwritten.
    """
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
    return (
        _scaled(encoder, fold.activation_scale * fold.input_scale),
        _scaled(bias, fold.activation_scale),
        _scaled(decoder, 1 / (fold.activation_scale * fold.output_scale)),
    )


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as files take them: on the CPU, contiguous, and each with a storage of its own."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():
        storage = tensor.untyped_storage()  # a view would be saved with all of its base
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            plain[name] = tensor.clone()
        seen.add(storage.data_ptr())
    return plain


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor.mul_(factor)
