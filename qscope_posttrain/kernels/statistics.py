"""Add sparse codes into running sums per group and feature, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from qscope_posttrain.kernels.checks import check_floating, check_indices, check_same, check_shape

ENTRIES_AT_A_TIME = 1 << 20  # Entries widened to fp64 and int64 at a time outside of CUDA: 24 MiB
DTYPES = {"activation_sum": (torch.float64,), "firing_count": (torch.int64,), "maximum": (torch.float32, torch.float64)}


def feature_statistics_(
    values: Tensor,
    indices: Tensor,
    groups: Tensor | None = None,
    *,
    activation_sum: Tensor | None = None,
    firing_count: Tensor | None = None,
    maximum: Tensor | None = None,
) -> None:
    """Add the entries of a sparse code to those statistics that are given, each `[G, S]` and contiguous, in place.

    Args:
        values: `[T, w]`, floating point. An entry of value 0 only fills the rectangle and counts nowhere.
        indices: `[T, w]`, int32 or int64, each in `[0, S)`; checked on the CPU, where looking at them is free.
        groups: `[T]`, int32 or int64, below G: the group of each token. A token with a negative group is left out,
            whatever its entries hold, also NaN. None puts all tokens into group 0.
        activation_sum: fp64: sum of the values.
        firing_count: int64: number of values above 0; a negative survivor of a signed top-k does not fire.
        maximum: fp32 or fp64: the largest value so far. Start from 0 for activations, from -inf for signed codes.

    One launch on CUDA; nothing waits for the device, and nothing of size `[T, S]` exists. The last bits of fp64 sums
    depend on the order of the tokens and, on CUDA, where they are added by atomics, change from run to run.
    """
    check_shape("values", values, ("tokens", "width"))
    check_shape("indices", indices, tuple(values.shape))
    check_floating(values=values)
    check_indices("indices", indices)
    if groups is None:
        groups = indices.new_zeros(values.shape[0])
    check_shape("groups", groups, (values.shape[0],))
    check_indices("groups", groups)
    given = {"activation_sum": activation_sum, "firing_count": firing_count, "maximum": maximum}
    sums = {name: tensor for name, tensor in given.items() if tensor is not None}
    if not sums:
        raise ValueError("nothing to add to: give activation_sum, firing_count or maximum")
    check_same("device", values=values, indices=indices, groups=groups, **sums)
    shape = next(iter(sums.values())).shape
    for name, tensor in sums.items():
        if tensor.ndim != 2 or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous [groups, d_sae], like the others, got {list(tensor.shape)} with strides "
                f"{list(tensor.stride())}"
            )
        if tensor.dtype not in DTYPES[name]:
            raise TypeError(f"{name} must be {' or '.join(map(str, DTYPES[name]))}, got {tensor.dtype}")
    _feature_statistics_(values.detach(), indices, groups, activation_sum, firing_count, maximum)


@torch.library.custom_op(
    "qscope_posttrain::feature_statistics_", mutates_args=("activation_sum", "firing_count", "maximum")
)
def _feature_statistics_(
    values: Tensor,
    indices: Tensor,
    groups: Tensor,
    activation_sum: Tensor | None,
    firing_count: Tensor | None,
    maximum: Tensor | None,
) -> None:
    if values.numel() == 0:
        return
    if values.is_cuda:
        from qscope_posttrain.kernels.triton.statistics import feature_statistics_ as on_cuda

        on_cuda(values, indices, groups, activation_sum, firing_count, maximum)
        return
    first = next(sums for sums in (activation_sum, firing_count, maximum) if sums is not None)
    _check_range("indices", indices, 0, first.shape[1])
    _check_range("groups", groups, torch.iinfo(torch.int32).min, first.shape[0])
    step = max(1, ENTRIES_AT_A_TIME // values.shape[1])
    for start in range(0, values.shape[0], step):
        tokens = slice(start, start + step)
        counted = groups[tokens, None] >= 0
        value = torch.where(counted, values[tokens], 0).flatten()
        at = (groups[tokens, None].clamp(min=0).long() * first.shape[1] + indices[tokens]).flatten()
        if activation_sum is not None:
            activation_sum.view(-1).index_add_(0, at, value.double())
        if firing_count is not None:
            firing_count.view(-1).index_add_(0, at, (value > 0).long())
        if maximum is not None:
            seen = torch.where(value == 0, -torch.inf, value).to(maximum.dtype)
            maximum.view(-1).scatter_reduce_(0, at, seen, "amax")


def _check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    if tensor.device.type == "cpu":
        found = tensor.aminmax()
        if int(found.min) < low or int(found.max) >= high:
            raise ValueError(f"{name} must lie below {high}, got {int(found.min)} to {int(found.max)}")
