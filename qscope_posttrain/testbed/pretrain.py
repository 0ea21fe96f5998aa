"""Pretraining of the testbed's language model, with the habit of switching in its data."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from transformers import PreTrainedModel

from qscope_posttrain.report.progress import progress
from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.windows import Windows

SHARDS = 2
"""Parts of a batch whose gradients are summed, and so the most processes that can share the work."""

_WARMUP_STEPS = 60
_WEIGHT_DECAY = 0.05
_RESULT = "result.pt"


def pretrain(model: PreTrainedModel, windows: Windows, config: TestbedConfig, processes: int = 1) -> list[float]:
    """Train on `windows` in order, every token predicted; returns the loss (nats per token) of every step.

    A batch is always cut in two and the gradients of both halves are summed, in one process or in two with a thread
    each, so that the weights do not depend on the number of processes. On two cores two processes take little more than
    half the time, which two threads do not reach on matrices this small.

    Raises:
        ValueError: there are fewer windows than `pretraining_steps * pretraining_batch_size`, a batch that cannot be
            cut in two, or more than two processes.
    """
    size = config.pretraining_batch_size
    needed = config.pretraining_steps * size
    if len(windows) < needed:
        raise ValueError(f"{config.pretraining_steps} steps of {size} windows need {needed}, got {len(windows)}")
    if size % SHARDS or not 1 <= processes <= SHARDS:
        raise ValueError(f"pretraining cuts a batch in {SHARDS}: got batches of {size} and {processes} processes")
    batches = windows.input_ids[:needed].view(config.pretraining_steps, size, -1)
    if processes == 1:
        return _train(model, batches, config)
    with tempfile.TemporaryDirectory(prefix="qscope-pretraining-") as folder:
        multiprocessing.spawn(_worker, (model, batches, config, folder), nprocs=processes)
        result = torch.load(Path(folder) / _RESULT, weights_only=True)
    model.load_state_dict(result["weights"])
    model.eval()
    return list(result["losses"])


def _worker(rank: int, model: PreTrainedModel, batches: Tensor, config: TestbedConfig, folder: str) -> None:
    """One of two processes; the first writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SHARDS)
    try:
        model = copy.deepcopy(model)  # what arrives lies in memory that both processes share
        losses = _train(model, batches, config, rank)
        if rank == 0:
            torch.save({"weights": model.state_dict(), "losses": losses}, Path(folder) / _RESULT)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _train(model: PreTrainedModel, batches: Tensor, config: TestbedConfig, rank: int | None = None) -> list[float]:
    """Train on `batches` [steps, windows, length]; with a rank, on its half of each, summing gradients over ranks."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.pretraining_learning_rate,
        betas=(0.9, 0.98),
        weight_decay=_WEIGHT_DECAY,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, len(batches)))
    losses: list[Tensor] = []
    model.train()
    for batch in progress(batches, total=len(batches), description="pretraining the language model"):
        halves = batch.chunk(SHARDS)
        loss = torch.zeros(())
        for half in halves if rank is None else halves[rank : rank + 1]:
            part = model(input_ids=half, labels=half, use_cache=False).loss / SHARDS
            part.backward()
            loss += part.detach()
        if rank is not None:
            _sum_over_processes(parameters, loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
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


def _cosine(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 3 % of the peak."""
    warm = min(1.0, (step + 1) / _WARMUP_STEPS)
    done = min(1.0, max(0.0, (step - _WARMUP_STEPS) / max(1, steps - _WARMUP_STEPS)))
    return warm * (0.03 + 0.97 * 0.5 * (1.0 + math.cos(math.pi * done)))
