"""Selection and chosen dot products on the CPU in C: the results of `kernels.select`, 2 to 4 times faster.

select.c is compiled on first use with the system's C compiler ($CC, or cc) into $XDG_CACHE_HOME/qscope_posttrain (by
default ~/.cache), under a name that holds the hash of the source. Without a compiler, or with QSCOPE_NATIVE=0, plain
torch computes the same: the values and indices of the selection to the bit, dot products up to rounding.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("select.c")
_FLAGS = ("-O3", "-fPIC", "-shared")
_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


def enabled() -> bool:
    """Whether the compiled functions are wanted (QSCOPE_NATIVE is not "0") and available."""
    return os.environ.get("QSCOPE_NATIVE", "1") != "0" and library() is not None


def can_merge(pre: Tensor) -> bool:
    return pre.dtype in _NAMES and pre.device.type == "cpu" and pre.is_contiguous() and enabled()


def can_multiply(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> bool:
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and W_enc.dtype in _NAMES
    return fits and x.is_contiguous() and W_enc.is_contiguous() and b_enc.is_contiguous() and enabled()


def merge_(values: Tensor, indices: Tensor, filled: int, pre: Tensor, offset: int) -> None:
    """As `kernels.select.merge_`, for float32 and bfloat16 tiles."""
    k, n = values.shape[1], pre.shape[1]
    capacity = 2 * k + 1024  # and room for the lanes of the first threshold
    merge = _function(f"merge_{_NAMES[pre.dtype]}", 3, 5, 1, 1)

    def part(start: int, stop: int) -> None:
        found = torch.empty(capacity, dtype=torch.int64)
        places = (values[start:stop], indices[start:stop], pre[start:stop])
        merge(*map(Tensor.data_ptr, places), stop - start, n, k, filled, offset, found.data_ptr(), capacity)

    _in_threads(part, pre.shape[0])


def dot_products(
    out: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, indices: Tensor, first: Tensor, last: Tensor
) -> None:
    """out[t, j] = x[t] . W_enc[indices[t, j]] + b_enc[..] in float32 for first[t] <= j < last[t] (int32), in place."""
    multiply = _function(f"dot_{_NAMES[W_enc.dtype]}", 7, 3)

    def part(start: int, stop: int) -> None:
        rows = slice(start, stop)
        tensors = (out[rows], x[rows], W_enc, b_enc, indices[rows], first[rows], last[rows])
        multiply(*map(Tensor.data_ptr, tensors), stop - start, indices.shape[1], x.shape[1])

    _in_threads(part, x.shape[0])


def _in_threads(work: Callable[[int, int], None], rows: int) -> None:
    """work(start, stop) over all rows, in as many threads as torch uses: ctypes lets other threads run meanwhile."""
    threads = min(torch.get_num_threads(), rows)
    if threads <= 1:
        work(0, rows)
        return
    bounds = [rows * number // threads for number in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))


def _function(name: str, *kinds: int) -> Callable[..., None]:
    """A function of the library; `kinds` counts its arguments: pointers, integers, pointers, integers .."""
    function, types = getattr(library(), name), (ctypes.c_void_p, ctypes.c_int64)
    function.argtypes = [types[place % 2] for place, count in enumerate(kinds) for _ in range(count)]
    function.restype = None
    return function


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, logged once, where they cannot be had."""
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).info("selection in plain torch, because select.c was not compiled: %s", error)
        return None


def _compiled() -> Path:
    command = [*shlex.split(os.environ.get("CC", "cc")), *_FLAGS]
    digest = hashlib.sha256(_SOURCE.read_bytes() + "\0".join(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qscope_posttrain"
    path = folder / f"select-{digest}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            subprocess.run([*command, "-o", str(made), str(_SOURCE)], check=True, capture_output=True, timeout=120)
            made.replace(path)  # whole or not at all, also with several processes
    return path
