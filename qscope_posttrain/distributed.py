"""Sums over the processes that train one dictionary together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes, in place, and returns it."""


def alone(value: Tensor) -> Tensor:
    """The sum over one process."""
    return value


def over_processes(value: Tensor) -> Tensor:
    """The sum over the processes of the default group, in place; the same bits on all of them.

    NCCL moves CUDA tensors only, so what lies on the CPU takes a detour.
    """
    if dist.get_backend() == "nccl" and value.device.type != "cuda":
        moved = value.cuda()
        dist.all_reduce(moved)
        return value.copy_(moved)
    dist.all_reduce(value)
    return value


def default_reduce() -> Reduce:
    """`over_processes` where several processes run, else `alone`."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return over_processes if several else alone


def gathered(value: Tensor, reduce: Reduce) -> Tensor:
    """The one-dimensional tensors of all processes end to end, in the order of the ranks; they may differ in length."""
    if reduce is alone:
        return value
    rank, processes = dist.get_rank(), dist.get_world_size()
    lengths = torch.zeros(processes, dtype=torch.int64, device=value.device)
    lengths[rank] = value.numel()
    ends = reduce(lengths).cumsum(0).tolist()
    whole = value.new_zeros(ends[-1])
    whole[ends[rank] - value.numel() : ends[rank]] = value
    return reduce(whole)
