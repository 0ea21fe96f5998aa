"""Pretraining of the testbed's language model, with the habit of switching in its data."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from qscope_posttrain.report.progress import progress
from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.windows import Windows

_WARMUP_STEPS = 60
_WEIGHT_DECAY = 0.05


def pretrain(model: PreTrainedModel, windows: Windows, config: TestbedConfig) -> list[float]:
    """Train on `windows` in order, every token predicted; returns the loss (nats per token) of every step.

    Raises:
        ValueError: there are fewer windows than `pretraining_steps * pretraining_batch_size`.
    """
    size = config.pretraining_batch_size
    needed = config.pretraining_steps * size
    if len(windows) < needed:
        raise ValueError(f"{config.pretraining_steps} steps of {size} windows need {needed}, got {len(windows)}")
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.pretraining_learning_rate,
        betas=(0.9, 0.98),
        weight_decay=_WEIGHT_DECAY,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, config.pretraining_steps))
    losses: list[torch.Tensor] = []
    model.train()
    batches = windows.input_ids[:needed].split(size)
    for batch in progress(batches, total=len(batches), description="pretraining the language model"):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    model.eval()
    return torch.stack(losses).tolist()


def _cosine(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 3 % of the peak."""
    warm = min(1.0, (step + 1) / _WARMUP_STEPS)
    done = min(1.0, max(0.0, (step - _WARMUP_STEPS) / max(1, steps - _WARMUP_STEPS)))
    return warm * (0.03 + 0.97 * 0.5 * (1.0 + math.cos(math.pi * done)))
