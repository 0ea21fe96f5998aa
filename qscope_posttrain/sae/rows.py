"""The few rows of a dictionary that training and steering need, read without the dictionary."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qscope_posttrain.sae.checks import check_finite, check_tensor
from qscope_posttrain.sae.folding import compute_dtype
from qscope_posttrain.sae.source import SAESource

_PAGES_WORTH_A_SEEK = 8
"""Reading every eighth page of a file row on its own takes about as long as reading the row in order."""

_BLOCK_BYTES = 1 << 24
"""Part of the file that is mapped at a time while columns are gathered."""


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """Encoder and decoder rows of F features, in raw residual-stream units. Checked on construction."""

    feature_ids: Tensor
    """int64 [F], on the CPU."""
    encoder: Tensor
    """[F, d_model]"""
    encoder_bias: Tensor
    """[F]"""
    decoder: Tensor
    """Directions, [F, d_model]."""
    source: SAESource
    layer: int | None = None

    def __post_init__(self) -> None:
        count = self.feature_ids.shape[0]
        check_tensor("encoder", self.encoder, (count, None))
        check_tensor("encoder_bias", self.encoder_bias, (count,))
        check_tensor("decoder", self.decoder, (count, self.encoder.shape[1]))
        for name in ("encoder", "encoder_bias", "decoder"):
            check_finite(f"{name} of features {self.feature_ids.tolist()}", getattr(self, name))

    def __len__(self) -> int:
        return self.feature_ids.shape[0]


def feature_id_tensor(feature_ids: Sequence[int] | Tensor, d_sae: int) -> Tensor:
    """`feature_ids` as int64 [F] on the CPU. TypeError if they are not integers, ValueError if out of range or none."""
    ids = torch.as_tensor(feature_ids)
    if ids.ndim != 1 or ids.numel() == 0:
        raise ValueError(f"feature_ids must be a non-empty list of integers, got {feature_ids!r}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"feature_ids must be integers, got {ids.dtype}")
    ids = ids.to(device="cpu", dtype=torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= d_sae:
        bad = [number for number in ids.tolist() if not 0 <= number < d_sae]
        raise ValueError(f"feature ids {bad} are out of range: the dictionary has features 0..{d_sae - 1}")
    return ids


def gather(view: Tensor, ids: Tensor, memory_mapped: bool) -> Tensor:
    """A copy of view[ids] in (at least) float32, for a view [d_sae, n] whose rows are rows or columns of the file.

    A canonical row is contiguous: n * 4 bytes. The direction of a Qwen-Scope feature is a *column*, one number in
    each of n file rows, and costs a page of 4 KiB in each. For n = 2048 that is 8 MiB of the 256 MiB matrix,
    shared by features less than 1024 ids apart. Two habits of the kernel would make far more of it, and are countered:

    - Read-ahead around each page would fetch the whole matrix from a cold disk (measured on a file of 0.5 GiB: 264 MiB
      instead of 8 MiB for one feature), so random access is announced. Beyond some features their pages add up to the
      matrix, and read-ahead is left on: 32 features far apart take 0.7 s in order, 2.7 s page by page.
    - Pages that the cache already holds are mapped 16 at a time, which would count the matrix into the memory of the
      process, so pages are handed back block by block.
    """
    if not memory_mapped:
        return view.index_select(0, ids).to(compute_dtype(view))
    file_row_bytes = view.stride(1) * view.itemsize
    in_columns = view.stride(0) < view.stride(1)
    if not in_columns or len(ids) * _PAGES_WORTH_A_SEEK * mmap.PAGESIZE <= file_row_bytes:
        _advise(view, "MADV_RANDOM")
    if not in_columns:
        return view.index_select(0, ids).to(compute_dtype(view))
    gathered = torch.empty(len(ids), view.shape[1], dtype=compute_dtype(view))
    step = max(1, _BLOCK_BYTES // file_row_bytes)
    for start in range(0, view.shape[1], step):
        block = view[:, start : start + step]
        gathered[:, start : start + step] = block.index_select(0, ids)
        release_pages(block)
    return gathered


def release_pages(view: Tensor) -> None:
    """Hand the pages under a view of a file mapping back to the kernel."""
    _advise(view, "MADV_DONTNEED")


def _advise(view: Tensor, advice: str) -> None:
    """madvise on the pages of a tensor in a read-only file mapping; where it is refused, only speed and memory differ.

    MADV_DONTNEED loses nothing there: the pages are unmodified, and come from the file again when touched. Python's own
    mmap objects have this call, but the mapping here belongs to torch.
    """
    if not sys.platform.startswith("linux"):
        return
    last = sum((length - 1) * stride for length, stride in zip(view.shape, view.stride(), strict=True))
    first_page = view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = view.data_ptr() + (last + 1) * view.itemsize - first_page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first_page), ctypes.c_size_t(length), getattr(mmap, advice))
