"""Pretraining of the testbed's language model, with the habit of switching in its data."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import progress
from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.shared_training import SHARDS, sum_over_processes, train_shared, warm_cosine
from qscope_posttrain.testbed.windows import Windows

_WARMUP_STEPS = 60
_WEIGHT_DECAY = 0.05
_FLOOR = 0.03


def pretrain(model: PreTrainedModel, windows: Windows, config: TestbedConfig, processes: int = 1) -> list[float]:
    """Train on `windows` in order, every token predicted; returns the loss (nats per token) of every step.

    It runs on the model's device. The weights do not depend on the number of processes, see `shared_training`; two need
    the CPU.

    Raises:
        ValueError: there are fewer windows than `pretraining_steps * pretraining_batch_size`, a batch that cannot be
            cut in two, or more than two processes.
    """
    size = config.pretraining_batch_size
    needed = config.pretraining_steps * size
    if len(windows) < needed:
        raise UserValueError(f"{config.pretraining_steps} steps of {size} windows need {needed}, got {len(windows)}")
    if size % SHARDS or not 1 <= processes <= SHARDS:
        raise UserValueError(f"pretraining cuts a batch in {SHARDS}: got batches of {size} and {processes} processes")
    batches = windows.input_ids[:needed].view(config.pretraining_steps, size, -1)
    return train_shared(model, functools.partial(_train, batches=batches, config=config), processes)


def _train(model: PreTrainedModel, batches: Tensor, config: TestbedConfig, *, rank: int | None) -> list[float]:
    """Train on `batches` [steps, windows, length]; with a rank, on its half of each, summing gradients over ranks."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.pretraining_learning_rate,
        betas=(0.9, 0.98),
        weight_decay=_WEIGHT_DECAY,
        fused=True,
    )
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine(step, steps, _WARMUP_STEPS, _FLOOR)
    )
    losses: list[Tensor] = []
    device = model.device
    model.train()
    for batch in progress(batches, total=len(batches), description="pretraining the language model"):
        halves = batch.to(device).chunk(SHARDS)
        loss = torch.zeros((), device=device)
        for half in halves if rank is None else halves[rank : rank + 1]:
            part = model(input_ids=half, labels=half, use_cache=False).loss / SHARDS
            part.backward()
            loss += part.detach()
        if rank is not None:
            sum_over_processes(parameters, loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss)
    model.eval()
    return torch.stack(losses).tolist()
