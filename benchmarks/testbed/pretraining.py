"""Pretraining in one process or in two with a thread each; the weights do not depend on which.

A batch is always cut in two and the gradients of both halves are summed. On two cores two processes take little more
than half the time, which two threads do not reach on matrices as small as these.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.testbed.processes import worker_count
from benchmarks.testbed.settings import TaskSettings
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import progress

SHARDS = 2
"""Parts of a batch whose gradients are summed; also the largest number of processes."""
IGNORED = -100
"""Label of a token that is not predicted."""
_RESULT = "result.pt"


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine down to a share of the peak."""

    learning_rate: float
    weight_decay: float
    warmup_steps: int
    floor: float

    def share(self, step: int, steps: int) -> float:
        """Return the learning rate at a step, as a share of the peak."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        done = min(1.0, max(0.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps)))
        return warm * (self.floor + (1 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * done)))


class PartLoss(Protocol):
    """Loss of one part of a batch; the parts sum to the batch's loss. Picklable, as it is sent to other processes."""

    def __call__(self, model: PreTrainedModel, batch: Any, part: int) -> Tensor: ...


def pretrain(
    model: PreTrainedModel,
    batches: Sequence[Any],
    part_loss: PartLoss,
    schedule: Schedule,
    settings: TaskSettings,
    description: str = "pretraining the language model",
) -> list[float]:
    """Train on every batch once, on the device of `settings`; return the loss (nats per token) of every step.

    On the CPU it takes two processes if `settings.workers` allows. The model is in evaluation mode afterwards.
    """
    if any(len(batch) < SHARDS for batch in batches):
        raise UserValueError(f"pretraining cuts every batch into {SHARDS} parts; got a smaller batch")
    device = settings.torch_device()
    nn.Module.to(model, device)  # transformers' own `to` is wrapped in a way that hides its type
    training = functools.partial(_train, batches, part_loss, schedule, description)
    if device != "cpu" or worker_count(settings.workers, SHARDS) == 1:
        return training(model, None)
    with tempfile.TemporaryDirectory(prefix="qscope-pretraining-") as folder:
        multiprocessing.spawn(_worker, (model, training, folder), nprocs=SHARDS)
        result = torch.load(Path(folder) / _RESULT, weights_only=True)
    model.load_state_dict(result["weights"])
    model.eval()
    return list(result["losses"])


def _worker(rank: int, model: PreTrainedModel, training: Any, folder: str) -> None:
    """Run one of two processes; the first writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SHARDS)
    try:
        model = copy.deepcopy(model)  # what arrives lies in memory that both processes share
        losses = training(model, rank)
        if rank == 0:
            torch.save({"weights": model.state_dict(), "losses": losses}, Path(folder) / _RESULT)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _train(
    batches: Sequence[Any],
    part_loss: PartLoss,
    schedule: Schedule,
    description: str,
    model: PreTrainedModel,
    rank: int | None,
) -> list[float]:
    """Train on all parts of each batch, or on part `rank` with gradients summed over processes."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.share(step, len(batches)))
    losses: list[Tensor] = []
    model.train()
    for batch in progress(batches, total=len(batches), description=description):
        loss = torch.zeros((), device=model.device)
        for part in range(SHARDS) if rank is None else (rank,):
            # One backward per part: sums of gradients are then the same in one process and in two.
            share = part_loss(model, batch, part)
            share.backward()
            loss += share.detach()
        if rank is not None:
            _sum_over_processes(parameters, loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        losses.append(loss)
    model.eval()
    return torch.stack(losses).tolist()


def _sum_over_processes(parameters: Sequence[Tensor], loss: Tensor) -> None:
    """Replace all gradients and the loss by their sums over the processes, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    message = torch.cat([gradient.flatten() for gradient in gradients] + [loss.view(1)])
    dist.all_reduce(message)
    parts = message.split([gradient.numel() for gradient in gradients] + [1])
    for gradient, part in zip(gradients, parts, strict=False):
        gradient.copy_(part.view_as(gradient))
    loss.copy_(parts[-1].squeeze())
