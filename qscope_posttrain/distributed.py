"""Processes that work together: rank, joining, and sums over all of them. Torch is imported only when needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Reduce: TypeAlias = "Callable[[Tensor], Tensor]"  # Adds up a tensor over all processes, in place, and returns it


def process_rank() -> tuple[int, int]:
    """(rank, number of processes) of the default group; (0, 1) where nothing is distributed."""
    torch = sys.modules.get("torch")  # a process that never imported torch cannot have initialized it
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def is_main_process() -> bool:
    """True on rank 0 and in a single process. Before `torch.distributed` starts, the launcher's `RANK` decides."""
    rank, processes = process_rank()
    return rank == 0 and (processes > 1 or os.environ.get("RANK", "0") == "0")


def launched_processes() -> int:
    """Number of processes that the launcher (`accelerate launch`, torchrun) has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(device: str | None) -> str | None:
    """The device of this process. Under a launcher, join the other processes first, each on a device of its own."""
    if launched_processes() == 1:
        return device
    import torch
    from accelerate import PartialState

    return str(PartialState(cpu=device == "cpu" or not torch.cuda.is_available()).device)


def alone(value: Tensor) -> Tensor:
    """The sum over one process."""
    return value


def over_processes(value: Tensor) -> Tensor:
    """The sum over the processes of the default group, in place; the same bits on all of them."""
    import torch.distributed as dist

    shared = value.to(communication_device(value.device))
    dist.all_reduce(shared)
    return value if shared is value else value.copy_(shared)


def communication_device(device: torch.device) -> torch.device:
    """The device from which a tensor on `device` can be sent: NCCL moves CUDA tensors only, gloo those on the CPU."""
    import torch

    if torch.distributed.get_backend() == "nccl":
        return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def default_reduce() -> Reduce:
    """`over_processes` where several processes run, else `alone`."""
    return over_processes if process_rank()[1] > 1 else alone


def gathered(value: Tensor, reduce: Reduce) -> Tensor:
    """The one-dimensional tensors of all processes end to end, in the order of the ranks; they may differ in length."""
    if reduce is alone:
        return value
    import torch

    rank, processes = process_rank()
    lengths = torch.zeros(processes, dtype=torch.int64, device=value.device)
    lengths[rank] = value.numel()
    ends = reduce(lengths).cumsum(0).tolist()
    whole = value.new_zeros(ends[-1])
    whole[ends[rank] - value.numel() : ends[rank]] = value
    return reduce(whole)
