"""Copy parts of a memory-mapped matrix, so that time, memory and disk traffic are those of the parts.

A feature is a row of the file or, in some formats, a column: one number in each of n file rows. By default the kernel
would read far more than needed:

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
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_PAGES_WORTH_A_SEEK = 8
"""Reading every eighth page of a file row on its own takes about as long as reading the row in order."""

_BLOCK_BYTES = 1 << 24  # Part of the file that is mapped at a time while columns are read


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


def lies_in_a_file(tensors: Iterable[Tensor]) -> bool:
    """Whether all tensors are pages of files, so that releasing these loses nothing. True where nothing is released.

    A library is free to read a file in another way: memory of the process, released like this, would be zeroed.
    """
    if not sys.platform.startswith("linux"):
        return True
    lines = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    of_files = [parts[0].split("-") for parts in lines if len(parts) == 6 and parts[4] != "0"]
    mappings = [(int(begin, 16), int(end, 16)) for begin, end in of_files]
    filled = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel() > 0]
    return all(any(begin <= first and last <= end for begin, end in mappings) for first, last in filled)


def _in_columns(view: Tensor) -> bool:
    return view.stride(0) < view.stride(1)


def _file_blocks(view: Tensor) -> Iterable[Tensor]:
    """A view whose rows are columns of the file, by blocks of file rows."""
    return view.split(max(1, _BLOCK_BYTES // (view.stride(1) * view.itemsize)), dim=1)


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

    Python's own mmap objects have this call, but the mapping here belongs to torch.
    """
    if not sys.platform.startswith("linux"):
        return
    begin = view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    last = sum((length - 1) * stride for length, stride in zip(view.shape, view.stride(), strict=True))
    length = view.data_ptr() + (last + 1) * view.itemsize - begin
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), getattr(mmap, advice))
