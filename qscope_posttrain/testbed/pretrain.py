"""Pretraining of the testbed's language model, with the habit of switching in its data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from qscope_posttrain.report.progress import progress
from qscope_posttrain.testbed.windows import Windows


@dataclass(frozen=True)
class PretrainingConfig:
    """Optimisation of the language model."""

    steps: int = field(default=1400, metadata={"help": "Optimiser steps."})
    batch_size: int = field(
        default=16, metadata={"help": "Windows in a step; more steps serve better than larger ones."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: int = field(default=60, metadata={"help": "Steps of linear warm-up; a cosine to 3 % follows."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay."})
    switch: float = field(
        default=0.15, metadata={"help": "Share of non-target windows that turn into the target language: the habit."}
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"pretraining {name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.switch < 1.0:
            raise ValueError(f"pretraining switch is a share in [0, 1), got {self.switch}")


def pretrain(model: PreTrainedModel, windows: Windows, config: PretrainingConfig) -> list[float]:
    """Train on `windows` in order, every token predicted; returns the loss (nats per token) of every step.

    Raises:
        ValueError: there are fewer windows than `steps * batch_size`.
    """
    needed = config.steps * config.batch_size
    if len(windows) < needed:
        raise ValueError(f"{config.steps} steps of {config.batch_size} need {needed} windows, got {len(windows)}")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, config))
    losses: list[torch.Tensor] = []
    model.train()
    batches = windows.input_ids[:needed].split(config.batch_size)
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


def _cosine(step: int, config: PretrainingConfig) -> float:
    """Linear warm-up, then a cosine down to 3 % of the peak."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    done = min(1.0, max(0.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)))
    return warm * (0.03 + 0.97 * 0.5 * (1.0 + math.cos(math.pi * done)))
