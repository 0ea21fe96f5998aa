"""Pre-activations of a handful of features on CUDA, their gradient, and their penalty.

x is read in its own dtype; products are fp32.

`tf32x3` splits each fp32 factor into three tf32 parts: fp32's precision, on tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16
COLUMNS = 128


@triton.jit
def _preactivations(
    x, rows, bias, out, tokens, features, d_model, token_stride, column_stride,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    total = products(
        x, rows, token, feature, tokens, features, d_model, token_stride, column_stride, TOKENS, FEATURES, COLUMNS
    )
    known = feature < features
    total += tl.load(bias + feature, mask=known, other=0).to(tl.float32)[None, :]
    tl.store(out + token[:, None] * features + feature[None, :], total, mask=(token < tokens)[:, None] & known[None, :])


@triton.jit
def products(
    x, rows, token, feature, tokens, features, d_model, token_stride, column_stride,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x[token] . rows[feature], fp32 [TOKENS, FEATURES]."""
    total = tl.zeros([TOKENS, FEATURES], dtype=tl.float32)
    for start in range(0, d_model, COLUMNS):
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = column < d_model
        part = tl.load(
            x + token[:, None] * token_stride + column[None, :] * column_stride,
            mask=(token < tokens)[:, None] & inside[None, :], other=0,
        ).to(tl.float32)  # fmt: skip
        weight = tl.load(
            rows + feature[None, :].to(tl.int64) * d_model + column[:, None],
            mask=(feature < features)[None, :] & inside[:, None], other=0,
        ).to(tl.float32)  # fmt: skip
        total += tl.dot(part, weight, input_precision="tf32x3")
    return total


@triton.jit
def _spread(
    coefficients, scale, rows, out, tokens, features, d_model,
    HAS_SCALE: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = token < tokens
    inside = column < d_model
    total = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
    for start in range(0, features, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        known = feature < features
        at = token[:, None] * features + feature[None, :]
        both = live[:, None] & known[None, :]
        factor = tl.load(coefficients + at, mask=both, other=0).to(tl.float32)
        if HAS_SCALE:
            factor *= tl.load(scale + feature, mask=known, other=0).to(tl.float32)[None, :]
        row = tl.load(
            rows + feature[:, None].to(tl.int64) * d_model + column[None, :],
            mask=known[:, None] & inside[None, :], other=0,
        ).to(tl.float32)  # fmt: skip
        total += tl.dot(factor, row, input_precision="tf32x3")
    tl.store(
        out + token[:, None] * d_model + column[None, :],
        total.to(out.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )


def preactivations(x: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    """`x @ rows.T + bias`, fp32 `[T, F]`, of x `[T, D]` with any strides."""
    out = x.new_empty(x.shape[0], rows.shape[0], dtype=torch.float32)
    if out.numel() == 0:
        return out
    block = feature_block(rows)
    with torch.cuda.device_of(x):
        _preactivations[(triton.cdiv(x.shape[0], TOKENS), triton.cdiv(rows.shape[0], block))](
            x, rows.contiguous(), bias.contiguous(), out, *out.shape, rows.shape[1], *x.stride(),
            TOKENS=TOKENS, FEATURES=block, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out


def spread(coefficients: Tensor, rows: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """`coefficients @ rows`, `[T, D]` in `dtype`, of fp32 coefficients `[T, F]`, in one launch. With `scale` `[F]` the
    coefficients are bool, and each is multiplied by its feature's."""
    (tokens, features), d_model = coefficients.shape, rows.shape[1]
    out = rows.new_empty(tokens, d_model, dtype=dtype)
    if out.numel() == 0:
        return out
    coefficients = coefficients.contiguous()
    if scale is not None:
        coefficients = coefficients.view(torch.uint8)  # Triton reads a bool as what it is stored in.
    with torch.cuda.device_of(rows):
        _spread[(triton.cdiv(tokens, TOKENS), triton.cdiv(d_model, COLUMNS))](
            coefficients, None if scale is None else scale.contiguous(), rows.contiguous(), out, tokens, features,
            d_model, HAS_SCALE=scale is not None, TOKENS=TOKENS, FEATURES=feature_block(rows), COLUMNS=COLUMNS,
        )  # fmt: skip
    return out


def feature_block(rows: Tensor) -> int:
    """Features of a tile: all of them up to 64, at least the 16 that a matrix product needs."""
    return min(64, max(16, triton.next_power_of_2(rows.shape[0])))


@triton.jit
def _penalty(
    x, rows, bias, thresholds, groups, mask, active, partial,
    tokens, features, d_model, token_stride, column_stride,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    live = token < tokens
    known = feature < features
    total = products(
        x, rows, token, feature, tokens, features, d_model, token_stride, column_stride, TOKENS, FEATURES, COLUMNS
    )
    total += tl.load(bias + feature, mask=known, other=0).to(tl.float32)[None, :]
    group = tl.maximum(tl.load(groups + token, mask=live, other=0).to(tl.int64), 0)
    both = live[:, None] & known[None, :]
    total -= tl.load(thresholds + group[:, None] * features + feature[None, :], mask=both, other=0).to(tl.float32)
    counted = both & (tl.load(mask + token, mask=live, other=0) != 0)[:, None]
    # Written so that a NaN of a token that counts stays one, and that of another is dropped.
    excess = tl.where(counted & ~(total <= 0), total, 0.0)
    tl.store(active + token[:, None] * features + feature[None, :], (excess > 0).to(tl.uint8), mask=both)
    tl.store(partial + block * features + feature, tl.sum(excess, axis=0), mask=known)


def feature_penalty(
    x: Tensor, rows: Tensor, bias: Tensor, thresholds: Tensor, groups: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums [F], above [T], active [T, F]); see `kernels.penalty`. One launch reads x and leaves a bool
    per token and feature, and one sum per block of tokens; the blocks are added in a fixed order."""
    tokens, features = x.shape[0], rows.shape[0]
    active = mask.new_empty(tokens, features)
    blocks = triton.cdiv(tokens, TOKENS)
    partial = x.new_empty(blocks, features, dtype=torch.float32)
    if active.numel():
        block = feature_block(rows)
        with torch.cuda.device_of(x):
            _penalty[(blocks, triton.cdiv(features, block))](
                x, rows.contiguous(), bias.contiguous(), thresholds.contiguous(), groups.contiguous(),
                mask.contiguous().view(torch.uint8), active.view(torch.uint8), partial, tokens, features, rows.shape[1],
                *x.stride(), TOKENS=TOKENS, FEATURES=block, COLUMNS=COLUMNS,
            )  # fmt: skip
    return partial.sum(0), active.any(-1), active
