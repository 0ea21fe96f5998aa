"""Pretraining in one process or in two with a thread each, so that the weights do not depend on which.

A batch is always cut in two and the gradients of both halves are summed. On two cores two processes take little more
than half the time, which two threads do not reach on matrices as small as the testbed's.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from transformers import PreTrainedModel

SHARDS = 2
"""Parts of a batch whose gradients are summed, and so the most processes that can share the work."""

_RESULT = "result.pt"


class Training(Protocol):
    """What a process does; it is sent to the others, so it must be picklable (`functools.partial` of a function)."""

    def __call__(self, model: PreTrainedModel, *, rank: int | None) -> list[float]:
        """Train `model` and return the loss of every step; with a rank, on its half of each batch."""


def train_shared(model: PreTrainedModel, training: Training, processes: int) -> list[float]:
    """Run `training` in this process or in two; `model` has the weights afterwards, in evaluation mode."""
    if processes == 1:
        return training(model, rank=None)
    with tempfile.TemporaryDirectory(prefix="qscope-pretraining-") as folder:
        multiprocessing.spawn(_worker, (model, training, folder), nprocs=processes)
        result = torch.load(Path(folder) / _RESULT, weights_only=True)
    model.load_state_dict(result["weights"])
    model.eval()
    return list(result["losses"])


def _worker(rank: int, model: PreTrainedModel, training: Training, folder: str) -> None:
    """One of two processes; the first writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SHARDS)
    try:
        model = copy.deepcopy(model)  # what arrives lies in memory that both processes share
        losses = training(model, rank=rank)
        if rank == 0:
            torch.save({"weights": model.state_dict(), "losses": losses}, Path(folder) / _RESULT)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def sum_over_processes(parameters: Sequence[Tensor], loss: Tensor) -> None:
    """Replace all gradients and the loss by their sums over the processes, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    message = torch.cat([gradient.flatten() for gradient in gradients] + [loss.view(1)])
    dist.all_reduce(message)
    parts = message.split([gradient.numel() for gradient in gradients] + [1])
    for gradient, part in zip(gradients, parts, strict=False):
        gradient.copy_(part.view_as(gradient))
    loss.copy_(parts[-1].squeeze())


def warm_cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the peak learning rate: a linear warm-up, then a cosine down to `floor`."""
    warm = min(1.0, (step + 1) / warmup)
    done = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    return warm * (floor + (1 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))
