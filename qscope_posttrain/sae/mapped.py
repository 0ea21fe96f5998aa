"""Copying parts of a matrix out of a file mapping, at the price of these parts in time, memory and disk traffic.

A feature is a row of the file, or, in some formats, a column of it: one number in each of n file rows. Left to itself,
the kernel makes far more of either than was asked for, and is told better:

- Read-ahead around each page would fetch the whole matrix for a column (measured on a file of 0.5 GiB: 264 MiB instead
  of 8 MiB for one feature), so random access is announced, and the pages that are needed are asked for all at once,
  before the first is waited for. Beyond some features their pages add up to the matrix, and read-ahead is left on: 32
  features far apart take 0.7 s in order, 2.7 s page by page.
- Pages that the cache already holds are mapped 16 at a time, which takes its time and would count the matrix into the
  memory of the process. So the numbers of a few columns are read one by one, without a mapping, and where much is
  read through the mapping, its pages are handed back block by block.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qscope_posttrain.sae.folding import compute_dtype

_PAGES_WORTH_A_SEEK = 8
"""Reading every eighth page of a file row on its own takes about as long as reading the row in order."""

_BLOCK_BYTES = 1 << 24
"""Part of the file that is mapped at a time while columns are read."""


def gather(view: Tensor, ids: Tensor, memory_mapped: bool) -> Tensor:
    """A copy of view[ids] in (at least) float32, for a view [d_sae, n] whose rows are rows or columns of the file.

    A feature that is a column costs a page of 4 KiB in each of n file rows: for n = 2048 that is 8 MiB of a matrix of
    256 MiB, shared by features less than 1024 ids apart.
    """
    if not memory_mapped or not _in_columns(view):
        if memory_mapped:
            _advise(view, "MADV_RANDOM")
        return view.index_select(0, ids).to(compute_dtype(view))
    file_row_bytes = view.stride(1) * view.itemsize
    if len(ids) * _PAGES_WORTH_A_SEEK * mmap.PAGESIZE <= file_row_bytes:
        _advise(view, "MADV_RANDOM")
        found = _read_numbers(view, ids)
        if found is not None:
            return found
    gathered = torch.empty(len(ids), view.shape[1], dtype=compute_dtype(view))
    step = max(1, _BLOCK_BYTES // file_row_bytes)
    for start in range(0, view.shape[1], step):
        block = view[:, start : start + step]
        gathered[:, start : start + step] = block.index_select(0, ids)
        _advise(block, "MADV_DONTNEED")
    return gathered


def copy_block(view: Tensor, memory_mapped: bool) -> Tensor:
    """A contiguous copy of a view [features, n] in (at least) float32, leaving none of its pages in the process."""
    dtype = compute_dtype(view)
    if not memory_mapped or not _in_columns(view):
        copy = torch.empty(view.shape, dtype=dtype).copy_(view)
        if memory_mapped:
            _advise(view, "MADV_DONTNEED")
        return copy
    # In the order of the file first: torch transposes a whole matrix in blocks, but a part of one number by number.
    in_file_order = torch.empty(view.shape[1], view.shape[0], dtype=dtype)
    step = max(1, _BLOCK_BYTES // (view.stride(1) * view.itemsize))
    for start in range(0, view.shape[1], step):
        part = view[:, start : start + step]
        in_file_order[start : start + step] = part.t()
        _advise(part, "MADV_DONTNEED")
    return torch.empty(view.shape, dtype=dtype).copy_(in_file_order.t())


def lies_in_a_file(tensors: Iterable[Tensor]) -> bool:
    """Whether all tensors are pages of files, so that handing these back loses nothing. True where it does not matter.

    How a library reads a file is its own affair, and may change: memory of the process, handed back, would be zeroed.
    """
    if not sys.platform.startswith("linux"):
        return True
    mappings = _file_mappings()
    filled = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel() > 0]
    return all(any(m.begin <= first and last <= m.end for m in mappings) for first, last in filled)


class _Mapping(NamedTuple):
    """A file in the memory of this process."""

    begin: int
    end: int
    offset: int
    """Where in the file it begins."""
    inode: int
    path: str


def _file_mappings() -> list[_Mapping]:
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[4] != "0":
            begin, end = (int(number, 16) for number in parts[0].split("-"))
            found.append(_Mapping(begin, end, int(parts[2], 16), int(parts[4]), parts[5]))
    return found


def _read_numbers(view: Tensor, ids: Tensor) -> Tensor | None:
    """view[ids] as [F, n], each number read from the file by itself: a page that is mapped brings 15 others along.

    None where that cannot be done, and the mapping has to serve.
    """
    if not sys.platform.startswith("linux"):
        return None
    start = view.data_ptr()
    mapping = next((m for m in _file_mappings() if m.begin <= start < m.end), None)
    if mapping is None:
        return None
    _prefetch(view, ids)
    places = np.arange(view.shape[1])[:, None] * view.stride(1) + ids.numpy()[None] * view.stride(0)
    places = start - mapping.begin + mapping.offset + places * view.itemsize
    try:
        with open(mapping.path, "rb", buffering=0) as file:
            number = file.fileno()
            if os.fstat(number).st_ino != mapping.inode:  # another file took its name
                return None
            content = b"".join([os.pread(number, view.itemsize, place) for place in places.ravel().tolist()])
    except OSError:
        return None
    if len(content) != places.size * view.itemsize:
        return None
    numbers = torch.frombuffer(bytearray(content), dtype=view.dtype).view(places.shape)
    return numbers.t().contiguous().to(compute_dtype(view))


def _in_columns(view: Tensor) -> bool:
    return view.stride(0) < view.stride(1)


def _prefetch(view: Tensor, ids: Tensor) -> None:
    """Ask for the pages of some columns that are not in the cache, all before the first is waited for."""
    if not sys.platform.startswith("linux"):
        return
    begin, length = _page_span(view)
    resident = (ctypes.c_ubyte * (length // mmap.PAGESIZE + 1))()
    libc = ctypes.CDLL(None)
    if libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(length), resident) != 0:
        return
    offsets = np.arange(view.shape[1])[:, None] * view.stride(1) + ids.numpy()[None] * view.stride(0)
    pages = np.unique((view.data_ptr() - begin + offsets * view.itemsize) // mmap.PAGESIZE)
    missing = pages[np.ctypeslib.as_array(resident)[pages] & 1 == 0]
    for page in missing.tolist():
        libc.madvise(ctypes.c_void_p(begin + page * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), mmap.MADV_WILLNEED)


def _advise(view: Tensor, advice: str) -> None:
    """madvise on the pages of a tensor in a read-only file mapping; where it is refused, only speed and memory differ.

    MADV_DONTNEED loses nothing there: the pages are unmodified, and come from the file again when touched. Python's own
    mmap objects have this call, but the mapping here belongs to torch.
    """
    if not sys.platform.startswith("linux"):
        return
    begin, length = _page_span(view)
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), getattr(mmap, advice))


def _page_span(view: Tensor) -> tuple[int, int]:
    """(address of the first page, bytes from there to the last element) of a view."""
    last = sum((length - 1) * stride for length, stride in zip(view.shape, view.stride(), strict=True))
    begin = view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    return begin, view.data_ptr() + (last + 1) * view.itemsize - begin
