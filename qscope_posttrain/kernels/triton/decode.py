"""Chosen rows of a table on CUDA: weighted sums of them, and dot products. No atomics: reproducible bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 16  # Rows that a program has under way at a time


@triton.jit
def _sum_rows(
    weights, rows, starts, table, bias, out, width, d_model,
    HAS_STARTS: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d_model
    if HAS_STARTS:
        first = tl.load(starts + segment)
        last = tl.load(starts + segment + 1)
    else:
        first = segment * width
        last = first + width
    total = tl.zeros([BLOCK], dtype=WIDE)
    for entry in range(first, last, ENTRIES):
        at = entry + tl.arange(0, ENTRIES)
        live = at < last
        weight = tl.load(weights + at, mask=live, other=0).to(WIDE)
        row = tl.load(rows + at, mask=live, other=0).to(tl.int64)
        tile = tl.load(
            table + row[:, None] * d_model + columns[None, :], mask=live[:, None] & inside[None, :], other=0
        ).to(WIDE)
        total += tl.sum(tile * weight[:, None], axis=0)
    if HAS_BIAS:
        total = total.to(out.dtype.element_ty).to(WIDE) + tl.load(bias + columns, mask=inside, other=0).to(WIDE)
    tl.store(out + segment * d_model + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dot_rows(
    x, rows, table, bias, first, last, out, width, d_model,
    HAS_BIAS: tl.constexpr, HAS_RANGE: tl.constexpr, WIDE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    live = entries < width
    stop = d_model
    if HAS_RANGE:
        live = live & (entries >= tl.load(first + token)) & (entries < tl.load(last + token))
        # A block without an entry in the range reads nothing.
        stop = d_model * tl.max(live.to(tl.int32), 0)
    row = tl.load(rows + token * width + entries, mask=live, other=0).to(tl.int64)
    total = tl.zeros([ENTRIES], dtype=WIDE)
    for start in range(0, stop, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < d_model
        part = tl.load(x + token * d_model + columns, mask=inside, other=0).to(WIDE)
        tile = tl.load(
            table + row[:, None] * d_model + columns[None, :], mask=live[:, None] & inside[None, :], other=0
        ).to(WIDE)
        total += tl.sum(tile * part[None, :], axis=1)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=live, other=0).to(WIDE)
    tl.store(out + token * width + entries, total.to(out.dtype.element_ty), mask=live)


def sum_rows(
    weights: Tensor, rows: Tensor, table: Tensor, *, segments: int, starts: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`sum of weights[n] table[rows[n]]` over the entries of each segment, plus `bias` `[D]`: `[segments, D]` in the
    dtype of `table`. Segments are of equal width unless `starts` `[segments + 1]` says where each begins."""
    d_model = table.shape[1]
    out = table.new_empty(segments, d_model)
    if out.numel() == 0:
        return out
    block = _block(d_model)
    with torch.cuda.device_of(table):
        _sum_rows[(segments, triton.cdiv(d_model, block))](
            weights.contiguous(), rows.contiguous(), None if starts is None else starts.contiguous(),
            table.contiguous(), None if bias is None else bias.contiguous(), out, weights.numel() // segments, d_model,
            HAS_STARTS=starts is not None, HAS_BIAS=bias is not None, WIDE=_wide(table), ENTRIES=ENTRIES, BLOCK=block,
        )  # fmt: skip
    return out


def dot_rows_(
    out: Tensor, x: Tensor, indices: Tensor, table: Tensor, bias: Tensor | None = None,
    first: Tensor | None = None, last: Tensor | None = None,
) -> None:  # fmt: skip
    """`out[t, j] = x[t] . table[indices[t, j]] + bias[indices[t, j]]`, in place, in one launch, in fp32, or fp64 where
    the table is. Other entries than `first[t] <= j < last[t]` are left as they are."""
    tokens, width = indices.shape
    if out.numel() == 0:
        return
    bias, first, last = (None if part is None else part.contiguous() for part in (bias, first, last))
    with torch.cuda.device_of(table):
        _dot_rows[(tokens, triton.cdiv(width, ENTRIES))](
            x.contiguous(), indices.contiguous(), table.contiguous(), bias, first, last, out, width, table.shape[1],
            HAS_BIAS=bias is not None, HAS_RANGE=first is not None,
            WIDE=_wide(table), ENTRIES=ENTRIES, BLOCK=min(256, _block(table.shape[1])),
        )  # fmt: skip


def _block(d_model: int) -> int:
    return min(512, max(16, triton.next_power_of_2(d_model)))


def _wide(table: Tensor) -> tl.constexpr:
    return tl.float64 if table.dtype == torch.float64 else tl.float32
