"""From a located file to the tensors of an SAE, or to some of its rows, with the same folding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.sae.activations import Activation, TopK
from qscope_posttrain.sae.checks import check_finite, check_tensor
from qscope_posttrain.sae.containers.mapped import compute_dtype, copy_block, gather
from qscope_posttrain.sae.formats import open_stored
from qscope_posttrain.sae.formats.stored import StoredSAE, fold_rows
from qscope_posttrain.sae.source import SAESource, locate

_BLOCK_BYTES = 1 << 25  # Float32 rows of the encoder that are folded at a time while a whole SAE is loaded

_PAGE_COLUMNS = 1024  # Features stored as columns are read in multiples of a page of the file


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """Encoder and decoder rows of F features, in raw residual-stream units."""

    feature_ids: Tensor  # int64 [F], on the CPU
    encoder: Tensor  # [F, d_model]
    encoder_bias: Tensor  # [F]
    decoder: Tensor  # Directions, [F, d_model]
    source: SAESource
    layer: int | None = None

    def __post_init__(self) -> None:
        count = len(self)
        check_tensor("encoder", self.encoder, (count, None))
        check_tensor("encoder_bias", self.encoder_bias, (count,))
        check_tensor("decoder", self.decoder, (count, self.encoder.shape[1]))
        for name in ("encoder", "encoder_bias", "decoder"):
            check_finite(f"{name} of features {self.feature_ids.tolist()}", getattr(self, name))

    def __len__(self) -> int:
        return self.feature_ids.shape[0]


def feature_id_tensor(feature_ids: Sequence[int] | Tensor, d_sae: int) -> Tensor:
    """`feature_ids` as int64 [F] on the CPU. TypeError if not integers, ValueError if empty or out of range."""
    ids = torch.as_tensor(feature_ids)
    if ids.ndim != 1 or ids.numel() == 0:
        raise UserValueError(f"feature_ids must be a non-empty list of integers, got {feature_ids!r}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserTypeError(f"feature_ids must be integers, got {ids.dtype}")
    ids = ids.to(device="cpu", dtype=torch.int64)
    bad = [number for number in ids.tolist() if not 0 <= number < d_sae]
    if bad:
        raise UserValueError(f"feature ids {bad} are out of range: the dictionary has features 0..{d_sae - 1}")
    return ids


def open_source(
    source: str | Path,
    layer: int | None = None,
    revision: str | None = None,
    d_model: int | None = None,
    input_scale: float | None = None,
) -> StoredSAE:
    """Find and open the file of one layer: its structure is checked, no matrix is read."""
    stored = open_stored(locate(source, layer, revision), input_scale)
    if d_model is not None and stored.d_model != d_model:
        raise UserValueError(
            f"{stored.path} is for a residual stream of width {stored.d_model}, but the model has {d_model}: "
            "this SAE belongs to another model"
        )
    return stored


def load_tensors(stored: StoredSAE, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The four canonical tensors. Beyond them, at most one block of rows is in memory at a time."""
    d_sae, d_model = stored.d_sae, stored.d_model
    b_dec = stored.b_dec.to(compute_dtype(stored.b_dec), copy=True)
    tensors = {
        "W_enc": torch.empty(d_sae, d_model, dtype=dtype, device=device),
        "b_enc": torch.empty(d_sae, dtype=dtype, device=device),
        "W_dec": torch.empty(d_sae, d_model, dtype=dtype, device=device),
    }
    step = max(1, _BLOCK_BYTES // (4 * d_model * _PAGE_COLUMNS)) * _PAGE_COLUMNS
    for start in range(0, d_sae, step):
        block = slice(start, min(start + step, d_sae))
        parts = (stored.W_enc[block], stored.b_enc[block].unsqueeze(1), stored.W_dec[block])
        encoder, bias, decoder = (copy_block(part, stored.memory_mapped) for part in parts)
        rows = fold_rows(stored.fold, encoder, bias.squeeze(1), decoder, stored.b_dec, block)
        for tensor, folded in zip(tensors.values(), rows, strict=True):
            tensor[block] = folded
    return tensors | {"b_dec": (b_dec / stored.fold.output_scale).to(device, dtype)}


def read_rows(stored: StoredSAE, feature_ids: Sequence[int] | Tensor) -> FeatureRows:
    """The rows of some features as float32; only these are read from the file, see `containers.mapped.gather`."""
    ids = feature_id_tensor(feature_ids, stored.d_sae)
    parts = (stored.W_enc, stored.b_enc.unsqueeze(1), stored.W_dec)
    encoder, bias, decoder = (gather(part, ids, stored.memory_mapped) for part in parts)
    rows = fold_rows(stored.fold, encoder, bias.squeeze(1), decoder, stored.b_dec, ids)
    encoder, bias, decoder = (part.float() for part in rows)
    try:
        return FeatureRows(ids, encoder, bias, decoder, stored.source(), stored.layer)
    except ValueError as error:
        raise UserValueError(f"{stored.path}: {error}") from error


def activation_of(stored: StoredSAE, k: int | None) -> Activation:
    """The activation by file, release name and caller, which must not contradict each other."""
    own, release = stored.activation, stored.located.release
    if own is not None and not isinstance(own, TopK) and k is not None:
        raise UserValueError(f"{stored.path} has a {type(own).__name__} activation, so k={k} means nothing")
    stated = {
        "the file": own.k if isinstance(own, TopK) else None,
        f"the release name {release.name if release else ''}": release.k if release else None,
        "the caller": k,
    }
    known = {who: value for who, value in stated.items() if value is not None}
    if len(set(known.values())) > 1:
        words = ", ".join(f"{who} says k={value}" for who, value in known.items())
        raise UserValueError(f"{stored.path}: contradicting k: {words}")
    if own is not None:
        return own
    if not known:
        raise UserValueError(
            f"{stored.path}: k is not in the file, and no folder above it is named like a release "
            "(SAE-Res-<model>-W<N>K-L0_<k>): give it with k=..., for Qwen-Scope 50 or 100"
        )
    try:
        activation = TopK(next(iter(known.values())))
        activation.check(stored.d_sae)
    except ValueError as error:
        raise UserValueError(f"{stored.path}: {error}") from error
    return activation
