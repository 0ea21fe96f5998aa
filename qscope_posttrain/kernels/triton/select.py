"""Exact selection of the k first of each row on CUDA: a program per row, the row's keys in registers, read once.

The k-th largest key is found one bit after another by counting, from the top; then entries above it are kept, and of
those equal to it the first. Nothing is sorted and there are no atomics, so the result is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # Most features of a row that one program holds


@triton.jit
def _order(value, INT: tl.constexpr, LOWEST: tl.constexpr, NAN: tl.constexpr):
    """Integers in the order of `kernels.select`: NaN above +Inf, -0.0 equal to 0.0."""
    bits = value.to(INT, bitcast=True)
    bits = tl.where(value != value, NAN, bits)
    return tl.where(bits >= 0, bits, LOWEST - tl.where(bits == LOWEST, LOWEST, bits + 1))


@triton.jit
def _merge(
    pre, bias, values, indices, n, stride, offset, filled, k,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, INT: tl.constexpr, LOWEST: tl.constexpr, NAN: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column, slot = tl.arange(0, BLOCK), tl.arange(0, KEPT)
    live, old = column < n, slot < filled
    value = tl.load(pre + row * stride + column, mask=live, other=0).to(WIDE)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=live, other=0).to(WIDE)
    key = tl.where(live, _order(value, INT, LOWEST, NAN), LOWEST)
    old_value = tl.load(values + row * k + slot, mask=old, other=0)
    old_index = tl.load(indices + row * k + slot, mask=old, other=0)
    old_key = tl.where(old, _order(old_value, INT, LOWEST, NAN), LOWEST)
    # The running threshold: a row that holds k entries already changes only if the tile has a larger one.
    if (filled < k) | (tl.max(key, 0) > tl.min(tl.where(old, old_key, NAN), 0)):
        wanted = tl.minimum(k, filled + n)
        reached = tl.sum((key >= 0).to(tl.int32), 0) + tl.sum((old_key >= 0).to(tl.int32), 0)
        threshold = tl.where(reached >= wanted, tl.zeros((), INT), tl.full((), LOWEST, INT))
        for bit in range(1, BITS):
            higher = threshold | (tl.full((), 1, INT) << (BITS - 1 - bit))
            reached = tl.sum((key >= higher).to(tl.int32), 0) + tl.sum((old_key >= higher).to(tl.int32), 0)
            threshold = tl.where(reached >= wanted, higher, threshold)
        above, old_above = key > threshold, old_key > threshold
        tied, old_tied = (key == threshold) & live, (old_key == threshold) & old
        room = wanted - tl.sum(above.to(tl.int32), 0) - tl.sum(old_above.to(tl.int32), 0)
        old_keep = old_above | (old_tied & (tl.cumsum(old_tied.to(tl.int32), 0) <= room))
        room -= tl.sum(old_tied.to(tl.int32), 0)
        keep = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
        old_place = tl.cumsum(old_keep.to(tl.int32), 0) - 1
        place = tl.sum(old_keep.to(tl.int32), 0) + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(values + row * k + old_place, old_value, mask=old_keep)
        tl.store(indices + row * k + old_place, old_index, mask=old_keep)
        tl.store(values + row * k + place, value, mask=keep)
        tl.store(indices + row * k + place, (column + offset).to(tl.int32), mask=keep)


def merge_(values: Tensor, indices: Tensor, filled: int, pre: Tensor, offset: int, bias: Tensor | None = None) -> None:
    """As `kernels.select.merge_`, but the k entries are left in the order of their indices; adds `bias` [n] to `pre`.
    One launch per 8192 features, and no synchronization."""
    rows, k = values.shape
    wide = values.dtype == torch.float64
    for start in range(0, pre.shape[1], BLOCK):
        tile = pre[:, start : start + BLOCK]
        with torch.cuda.device_of(values):
            _merge[(rows,)](
                tile, None if bias is None else bias[start : start + BLOCK].contiguous(), values, indices,
                tile.shape[1], tile.stride(0), offset + start, min(k, filled + start), k,
                HAS_BIAS=bias is not None, WIDE=tl.float64 if wide else tl.float32, INT=tl.int64 if wide else tl.int32,
                LOWEST=-(2**63) if wide else -(2**31), NAN=0x7FF8 << 48 if wide else 0x7FC00000,
                BITS=64 if wide else 32, BLOCK=triton.next_power_of_2(tile.shape[1]),
                KEPT=triton.next_power_of_2(k), num_warps=8 if tile.shape[1] > 2048 else 4,
            )  # fmt: skip
