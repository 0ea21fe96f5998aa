"""Additive steering on CUDA: one launch, nothing allocated."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _steer(
    hidden, directions, strengths, out, tokens, count, d_model,
    row_stride, token_stride, column_stride, out_row_stride, out_token_stride, out_column_stride,
    strength_row_stride, strength_token_stride, strength_stride, direction_stride, direction_column_stride,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row = at // tokens
    token = at % tokens
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = column < d_model
    state = tl.load(hidden + row * row_stride + token * token_stride + column * column_stride, mask=inside, other=0)
    shift = tl.zeros([BLOCK], dtype=WIDE)
    steered = tl.zeros([BLOCK], dtype=tl.int1)
    for number in range(count):
        place = row * strength_row_stride + token * strength_token_stride + number * strength_stride
        strength = tl.load(strengths + place).to(WIDE) + tl.zeros([BLOCK], dtype=WIDE)
        # Masked, not branched: a direction of strength 0 is not read.
        shift += strength * tl.load(
            directions + number * direction_stride + column * direction_column_stride,
            mask=inside & (strength != 0), other=0,
        ).to(WIDE)  # fmt: skip
        steered = steered | (strength != 0)
    changed = (state.to(WIDE) + shift).to(out.dtype.element_ty)
    tl.store(
        out + row * out_row_stride + token * out_token_stride + column * out_column_stride,
        tl.where(steered, changed, state),
        mask=inside,
    )


def steer_add(hidden: Tensor, directions: Tensor, strengths: Tensor, out: Tensor) -> None:
    """`out = hidden + sum_n strengths[b, t, n] directions[n]`, all with any strides; `out` may be `hidden`."""
    if hidden.numel() == 0:
        return
    rows, tokens, d_model = hidden.shape
    block = min(1024, max(16, triton.next_power_of_2(d_model)))
    with torch.cuda.device_of(hidden):
        _steer[(rows * tokens, triton.cdiv(d_model, block))](
            hidden, directions, strengths, out, tokens, directions.shape[0], d_model,
            *hidden.stride(), *out.stride(), *strengths.stride(), *directions.stride(),
            WIDE=tl.float64 if hidden.dtype == torch.float64 else tl.float32, BLOCK=block,
        )  # fmt: skip


@triton.jit
def _steer_planned(
    hidden, residual, table, plan, steered, d_model, hidden_stride, residual_stride, plan_stride,
    EDITS: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    entry = plan + token * plan_stride
    edits = tl.arange(0, EDITS)
    if tl.max(tl.load(entry + edits), axis=0) > 0:
        tl.atomic_add(steered, 1)
        for start in range(0, d_model, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < d_model
            place = hidden + token * hidden_stride + column
            stream = tl.load(place, mask=inside, other=0).to(tl.float32)
            if SUMMED:
                other = residual + token * residual_stride + column
                stream += tl.load(other, mask=inside, other=0).to(tl.float32)
            for number in tl.static_range(EDITS):
                row = tl.load(entry + number).to(tl.int64)
                strength = tl.load(entry + EDITS + number).to(tl.float32, bitcast=True)
                stream += strength * tl.load(table + row * d_model + column, mask=inside, other=0)
            if SUMMED:
                tl.store(other, stream.to(residual.dtype.element_ty), mask=inside)
                stream = tl.zeros([BLOCK], dtype=tl.float32)
            tl.store(place, stream.to(hidden.dtype.element_ty), mask=inside)


def steer_planned(hidden: Tensor, residual: Tensor | None, table: Tensor, plan: Tensor, steered: Tensor) -> None:
    """Steer tokens in place; a token without an entry costs the reading of its entry."""
    tokens, d_model = hidden.shape
    if tokens == 0:
        return
    other = hidden if residual is None else residual
    with torch.cuda.device_of(hidden):
        _steer_planned[(tokens,)](
            hidden, other, table, plan, steered, d_model, hidden.stride(0), other.stride(0), plan.stride(0),
            EDITS=plan.shape[1] // 2, SUMMED=residual is not None, BLOCK=min(1024, triton.next_power_of_2(d_model)),
        )  # fmt: skip
