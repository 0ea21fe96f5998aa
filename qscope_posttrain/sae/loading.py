"""From a located file to the tensors of an SAE, or to some of its rows, with the same folding.

Parts of a memory-mapped matrix are copied so that time, memory and disk traffic are those of the parts. A feature is a
row of the file or, in some formats, a column: one number in each of n file rows. By default the kernel would read far
more than needed:

- Read-ahead around each page would fetch the whole matrix for a column (264 MiB instead of 8 MiB for one feature of a
  file of 0.5 GiB), so random access is announced, and the needed pages are requested all at once. With many features
  their pages add up to the matrix, and read-ahead stays on: 32 features take 0.7 s in order, 2.7 s page by page.
- Pages that the cache already holds are mapped 16 at a time, which would count the matrix into the memory of the
  process. So what is read through the mapping is released block by block.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.sae.activations import Activation, TopK
from qscope_posttrain.sae.checks import check_finite, check_tensor
from qscope_posttrain.sae.formats import open_stored
from qscope_posttrain.sae.formats.stored import StoredSAE, fold_rows
from qscope_posttrain.sae.source import SAESource, locate

_BLOCK_BYTES = 1 << 25  # Float32 rows of the encoder that are folded at a time while a whole SAE is loaded
_MAPPED_BYTES = 1 << 24  # Part of the file that is mapped at a time while columns are read
_PAGE_COLUMNS = 1024  # Features stored as columns are read in multiples of a page of the file
_PAGES_WORTH_A_SEEK = 8  # Every eighth page of a file row, read on its own, takes as long as the row in order


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
    """The rows of some features as float32; only these are read from the file, see `loading.gather`."""
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


def compute_dtype(view: Tensor) -> torch.dtype:
    """float32, or float64 where the file holds that: rows are folded in it."""
    return torch.promote_types(torch.float32, view.dtype)


def gather(view: Tensor, ids: Tensor, memory_mapped: bool) -> Tensor:
    """A copy of view[ids] in (at least) float32, for a view [d_sae, n] whose rows are rows or columns of the file.

    A feature that is a column costs a page of 4 KiB in each of n file rows: for n = 2048 that is 8 MiB of a matrix of
    256 MiB, shared by features less than 1024 ids apart.
    """
    dtype = compute_dtype(view)
    if not memory_mapped:
        return view.index_select(0, ids).to(dtype)
    if not _in_columns(view):
        _advise(view, "MADV_RANDOM")
        return view.index_select(0, ids).to(dtype)
    if len(ids) * _PAGES_WORTH_A_SEEK * mmap.PAGESIZE <= view.stride(1) * view.itemsize:
        _advise(view, "MADV_RANDOM")
        _prefetch(view, ids)
    return torch.cat([_released(part, part.index_select(0, ids).to(dtype)) for part in _file_blocks(view)], dim=1)


def copy_block(view: Tensor, memory_mapped: bool) -> Tensor:
    """A contiguous copy of a view [features, n] in (at least) float32, leaving none of its pages in the process."""
    dtype = compute_dtype(view)
    if not memory_mapped or not _in_columns(view):
        copy = torch.empty(view.shape, dtype=dtype).copy_(view)
        return _released(view, copy) if memory_mapped else copy
    # In the order of the file first: torch transposes a whole matrix in blocks, but a part of one number by number.
    in_file_order = torch.cat([_released(part, part.t().to(dtype, copy=True)) for part in _file_blocks(view)])
    return torch.empty(view.shape, dtype=dtype).copy_(in_file_order.t())


def _in_columns(view: Tensor) -> bool:
    return view.stride(0) < view.stride(1)


def _file_blocks(view: Tensor) -> Iterable[Tensor]:
    """A view whose rows are columns of the file, by blocks of file rows."""
    return view.split(max(1, _MAPPED_BYTES // (view.stride(1) * view.itemsize)), dim=1)


def _released(view: Tensor, copy: Tensor) -> Tensor:
    """`copy`, after releasing the pages of `view`: unmodified, they come from the file again when touched."""
    _advise(view, "MADV_DONTNEED")
    return copy


def _prefetch(view: Tensor, ids: Tensor) -> None:
    """Request the pages of some columns, all before the first is waited for."""
    if sys.platform.startswith("linux"):
        offsets = np.arange(view.shape[1])[:, None] * view.stride(1) + ids.numpy()[None] * view.stride(0)
        pages = np.unique((view.data_ptr() + offsets * view.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE)
        madvise, size = ctypes.CDLL(None).madvise, ctypes.c_size_t(mmap.PAGESIZE)
        for page in pages.tolist():
            madvise(ctypes.c_void_p(page), size, mmap.MADV_WILLNEED)


def _advise(view: Tensor, advice: str) -> None:
    """madvise on the pages of a tensor in a read-only file mapping; if it is refused, only speed and memory differ.
    Python's own mmap objects have this call, but the mapping here belongs to torch."""
    if not sys.platform.startswith("linux"):
        return
    begin = view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    last = sum((length - 1) * stride for length, stride in zip(view.shape, view.stride(), strict=True))
    length = view.data_ptr() + (last + 1) * view.itemsize - begin
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), getattr(mmap, advice))
