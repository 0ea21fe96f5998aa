"""From a located file to the tensors of a dictionary, or to some of its rows, through one and the same folding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import AbsTopK, Activation, GroupMax, TopK
from qscope_posttrain.sae.folding import Rows, compute_dtype, fold_b_dec, fold_rows
from qscope_posttrain.sae.formats import open_stored
from qscope_posttrain.sae.formats.stored import StoredSAE
from qscope_posttrain.sae.mapped import copy_block, gather
from qscope_posttrain.sae.rows import FeatureRows, feature_id_tensor
from qscope_posttrain.sae.source import LocatedFile, locate

WITH_K = (TopK, AbsTopK, GroupMax)
"""Activations that k describes."""

_BLOCK_BYTES = 1 << 25
"""Float32 rows of the encoder that are folded at a time while a whole dictionary is loaded."""

_PAGE_COLUMNS = 1024
"""Features stored as columns are read in multiples of a page of the file."""


def open_source(
    source: str | Path, layer: int | None, revision: str | None, d_model: int | None, input_scale: float | None
) -> tuple[LocatedFile, StoredSAE]:
    """Find and open one layer's file: structure checked, no matrix read."""
    located = locate(source, layer, revision)
    stored = open_stored(located, input_scale)
    if d_model is not None and stored.b_dec.shape[0] != d_model:
        raise UserValueError(
            f"{stored.path} is for a residual stream of width {stored.b_dec.shape[0]}, but the model has {d_model}: "
            "this SAE belongs to another model"
        )
    return located, stored


def load_tensors(stored: StoredSAE, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The four canonical tensors. Beyond them, no more than a block of rows is in memory at a time."""
    d_sae, d_model = stored.W_enc.shape
    tensors = {
        "W_enc": torch.empty(d_sae, d_model, dtype=dtype, device=device),
        "b_enc": torch.empty(d_sae, dtype=dtype, device=device),
        "W_dec": torch.empty(d_sae, d_model, dtype=dtype, device=device),
        "b_dec": fold_b_dec(stored.fold, stored.b_dec.to(compute_dtype(stored.b_dec), copy=True)).to(device, dtype),
    }
    step = max(1, _BLOCK_BYTES // (4 * d_model * _PAGE_COLUMNS)) * _PAGE_COLUMNS
    for start in range(0, d_sae, step):
        block = slice(start, min(start + step, d_sae))
        rows = Rows(
            copy_block(stored.W_enc[block], stored.memory_mapped),
            copy_block(stored.b_enc[block].unsqueeze(1), stored.memory_mapped).squeeze(1),
            copy_block(stored.W_dec[block], stored.memory_mapped),
        )
        folded = fold_rows(stored.fold, rows, stored.b_dec, block)
        tensors["W_enc"][block] = folded.encoder
        tensors["b_enc"][block] = folded.bias
        tensors["W_dec"][block] = folded.decoder
    return tensors


def read_rows(located: LocatedFile, stored: StoredSAE, feature_ids: Sequence[int] | Tensor) -> FeatureRows:
    """Some features' rows as float32, touching only these in the file: see `mapped.gather`."""
    ids = feature_id_tensor(feature_ids, stored.b_enc.shape[0])
    try:
        rows = Rows(
            gather(stored.W_enc, ids, stored.memory_mapped),
            gather(stored.b_enc.unsqueeze(1), ids, stored.memory_mapped).squeeze(1),
            gather(stored.W_dec, ids, stored.memory_mapped),
        )
        folded = fold_rows(stored.fold, rows, stored.b_dec, ids)
        return FeatureRows(
            feature_ids=ids,
            encoder=folded.encoder.float(),
            encoder_bias=folded.bias.float(),
            decoder=folded.decoder.float(),
            source=located.describe(stored.format, None, stored.origin),
            layer=layer_of(located, stored),
        )
    except ValueError as error:
        raise UserValueError(f"{stored.path}: {error}") from error


def layer_of(located: LocatedFile, stored: StoredSAE) -> int | None:
    """The layer by the file, else by its name or the caller."""
    return located.layer if stored.layer is None else stored.layer


def activation_of(located: LocatedFile, stored: StoredSAE, k: int | None) -> Activation:
    """The activation by file, release name and caller, which must not contradict each other."""
    known: dict[str, int] = {}
    if isinstance(stored.activation, WITH_K):
        known["the file"] = stored.activation.k
    if located.release is not None:
        known[f"the release name {located.release.name}"] = located.release.k
    if k is not None:
        known["the caller"] = k
    if stored.activation is not None and not isinstance(stored.activation, WITH_K) and k is not None:
        raise UserValueError(
            f"{stored.path} has a {type(stored.activation).__name__} activation, so k={k} means nothing"
        )
    if len(set(known.values())) > 1:
        told = ", ".join(f"{who} says k={value}" for who, value in known.items())
        raise UserValueError(f"{stored.path}: contradicting k: {told}")
    if stored.activation is not None:
        return stored.activation
    if not known:
        raise UserValueError(
            f"{stored.path}: k is not in the file, and no folder above it is named like a release "
            "(SAE-Res-<model>-W<N>K-L0_<k>): give it with k=..., for Qwen-Scope 50 or 100"
        )
    activation = TopK(next(iter(known.values())))
    try:
        activation.check(stored.b_enc.shape[0])
    except ValueError as error:
        raise UserValueError(f"{stored.path}: {error}") from error
    return activation
