"""Statistics of a sparse code on CUDA: every entry is added where it belongs, by atomics, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _statistics(
    values, indices, groups, activation_sum, firing_count, maximum, entries, width, d_sae,
    HAS_SUM: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_MAXIMUM: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = entry < entries
    value = tl.load(values + entry, mask=live, other=0).to(WIDE)
    group = tl.load(groups + entry // width, mask=live, other=-1).to(tl.int64)
    live = live & (group >= 0) & (value != 0)
    at = group * d_sae + tl.load(indices + entry, mask=live, other=0).to(tl.int64)
    if HAS_SUM:
        tl.atomic_add(activation_sum + at, value.to(tl.float64), mask=live)
    if HAS_COUNT:
        tl.atomic_add(firing_count + at, tl.full([BLOCK], 1, tl.int64), mask=live & (value > 0))
    if HAS_MAXIMUM:
        tl.atomic_max(maximum + at, value.to(maximum.dtype.element_ty), mask=live)


def feature_statistics_(values: Tensor, indices: Tensor, groups: Tensor, *sums: Tensor | None) -> None:
    """See `kernels.statistics`; `sums` are activation_sum, firing_count and maximum."""
    d_sae = next(tensor.shape[1] for tensor in sums if tensor is not None)
    has_sum, has_count, has_maximum = (tensor is not None for tensor in sums)
    with torch.cuda.device_of(values):
        _statistics[(triton.cdiv(values.numel(), BLOCK),)](
            values.contiguous(), indices.contiguous(), groups.contiguous(), *sums, values.numel(), values.shape[1],
            d_sae, HAS_SUM=has_sum, HAS_COUNT=has_count, HAS_MAXIMUM=has_maximum,
            WIDE=tl.float64 if values.dtype == torch.float64 else tl.float32, BLOCK=BLOCK,
        )  # fmt: skip
