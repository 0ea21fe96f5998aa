"""Processes that work together: rank, joining, and sums over all of them. Torch is imported only when needed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

from qscope_posttrain.errors import UserOSError, UserValueError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMEOUT = "QSCOPE_TIMEOUT"  # Environment variable: seconds that processes which work together wait for one another
Reduce: TypeAlias = "Callable[[Tensor], Tensor]"  # Adds up a tensor over all processes, in place, and returns it

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Number of processes, as torch's launcher and those of MPI say it"""


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


def check_launch() -> None:
    """ValueError where `accelerate launch --cpu` has started one process in place of those that it was asked for."""
    asked = _is_on("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ
    if asked and not any(name in os.environ for name in _SIZES):
        raise UserValueError(
            "`accelerate launch --cpu` starts one process, whatever num_processes says. Leave --cpu out: the same file "
            "with --num_processes 2 starts two, and `--use_cpu true` (`--device cpu` outside of training) after the "
            "command keeps them on the CPU. For one process, leave `accelerate launch` out."
        )


def check_devices() -> None:
    """ValueError where a launcher has started more processes on this machine than it has GPUs."""
    import torch

    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if 0 < gpus < processes:
        raise UserValueError(
            f"{processes} processes were started on this machine, and it has {gpus} GPU{'s' if gpus > 1 else ''}: give "
            f"`accelerate launch` --num_processes {gpus}, times the number of machines."
        )


def left_out(trainer: Any) -> list[str]:
    """Sentences on what a launch file or recipe asks for and accelerate leaves out without a word, most on a CPU."""
    args, found = trainer.args, []
    if args.fp16 and args.device.type == "cpu":
        found.append("fp16 does nothing on a CPU: this training runs in fp32. bf16 works there.")
    if args.mixed_precision != "no" and not (args.fp16 or args.bf16):
        found.append(
            f"the launch file says mixed_precision: {args.mixed_precision}, and holds although the recipe asks for "
            "none: --mixed_precision no after `accelerate launch` turns it off."
        )
    if _is_on("ACCELERATE_USE_FSDP") and not trainer.is_fsdp_enabled:
        found.append(
            "the launch file asks for FSDP, which accelerate leaves out on a CPU: nothing is sharded, every process "
            "holds the whole model (DDP). The numbers are the same, the memory is not."
        )
    return found


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def join_processes(device: str | None, timeout: float | None = None, backend: str | None = None) -> str | None:
    """The device of this process. Under a launcher, join the other processes first, each on a device of its own. One
    that does not answer within `timeout` seconds, by default those of QSCOPE_TIMEOUT or 1800, is an error."""
    if launched_processes() == 1:
        return device
    import torch
    from accelerate import PartialState

    text = (os.environ.get(TIMEOUT) or "1800") if timeout is None else str(timeout)
    try:
        seconds = timedelta(seconds=float(text))
    except (ValueError, OverflowError) as error:
        raise UserValueError(f"{TIMEOUT}={text} is no number of seconds.") from error
    if device != "cpu":
        check_devices()
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    try:
        return str(PartialState(cpu=on_cpu, timeout=seconds, backend=backend).device)
    except (torch.distributed.DistError, ValueError) as error:  # ValueError: WORLD_SIZE is set, and no address
        count = launched_processes()
        raise UserOSError(f"{count} processes were started and have not come together ({error}).") from error


def absent_ranks(error: BaseException | None, wait: float = 5.0) -> str:
    """A sentence on the ranks behind an error of communication; "" for any other error, or where all ranks are there.

    A rank that still runs has failed in the same way, and leaves word of it in the launcher's store; one that leaves
    none within `wait` seconds is absent.
    """
    torch, (rank, processes) = sys.modules.get("torch"), process_rank()
    if processes == 1 or torch is None:
        return ""
    reason = str(error)
    if not isinstance(error, torch.distributed.DistError) and "gloo" not in reason:
        return ""
    place, until = f"qscope/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", time.monotonic() + wait
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=wait))
        store.set(f"{place}/{rank}", "failed too")
        absent = list(range(processes))
        while absent and time.monotonic() < until:
            time.sleep(0.1)
            absent = [other for other in absent if not store.check([f"{place}/{other}"])]
    except RuntimeError:
        absent = [0]  # without a launcher, the store is in rank 0
    if not absent:
        return ""
    names = ", ".join(map(str, absent[:8])) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    late = "timed out" in reason.lower() or "timeout" in reason.lower()
    fault = "did not answer in time: it hangs, or its machine is gone" if late else "has ended: what it said tells why"
    return f"rank {names} {fault} ({reason.rpartition('] ')[2].partition('. ')[0]})"


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
