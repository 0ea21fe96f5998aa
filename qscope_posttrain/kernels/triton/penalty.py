"""The penalty on CUDA: one launch reads x and leaves a bool per token and feature and one sum per block of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qscope_posttrain.kernels.triton.readout import COLUMNS, TOKENS, feature_block, products


@triton.jit
def _penalty(
    x, rows, bias, thresholds, groups, mask, weights, active, partial,
    tokens, features, d_model, token_stride, column_stride,
    HAS_WEIGHTS: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, COLUMNS: tl.constexpr,
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
    tl.store(partial + block * 2 * features + feature, tl.sum(excess, axis=0), mask=known)
    if HAS_WEIGHTS:
        excess *= tl.load(weights + token, mask=live, other=0).to(tl.float32)[:, None]
    tl.store(partial + (block * 2 + 1) * features + feature, tl.sum(excess, axis=0), mask=known)


def feature_penalty(
    x: Tensor, rows: Tensor, bias: Tensor, thresholds: Tensor, groups: Tensor, mask: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sums [F], excesses [F], above [T], active [T, F]); see `kernels.penalty`. Blocks are added in a fixed order."""
    tokens, features = x.shape[0], rows.shape[0]
    active = mask.new_empty(tokens, features)
    blocks = triton.cdiv(tokens, TOKENS)
    partial = x.new_empty(blocks, 2, features, dtype=torch.float32)
    if active.numel():
        block = feature_block(rows)
        with torch.cuda.device_of(x):
            _penalty[(blocks, triton.cdiv(features, block))](
                x, rows.contiguous(), bias.contiguous(), thresholds.contiguous(), groups.contiguous(),
                mask.contiguous().view(torch.uint8), None if weights is None else weights.contiguous(),
                active.view(torch.uint8), partial, tokens, features, rows.shape[1], *x.stride(),
                HAS_WEIGHTS=weights is not None, TOKENS=TOKENS, FEATURES=block, COLUMNS=COLUMNS,
            )  # fmt: skip
    excesses, sums = partial.sum(0)
    return sums.clone(), excesses.clone(), active.any(-1), active
