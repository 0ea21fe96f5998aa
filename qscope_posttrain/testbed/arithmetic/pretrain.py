"""Pretraining of the arithmetic model on documents of very different lengths, in one process or two."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import progress
from qscope_posttrain.testbed.shared_training import SHARDS, sum_over_processes, train_shared, warm_cosine

IGNORED = -100
"""Label of a token that is not predicted."""

_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.01
_WARMUP_STEPS = 50
_FLOOR = 0.05
_FORWARD_TOKENS = 400
"""What a forward costs beyond its tokens, in tokens."""


@dataclass(frozen=True)
class Row:
    """A document as tokens."""

    tokens: tuple[int, ...]
    """Prompt and completion."""
    prompt: int
    """How many of them are the prompt, which is not predicted."""


@dataclass(frozen=True)
class Group:
    """Documents padded to the longest of them."""

    input_ids: Tensor
    """[documents, tokens] int64."""
    labels: Tensor
    """[documents, tokens] int64, `IGNORED` on prompts and padding."""


def pretrain(
    model: PreTrainedModel,
    batches: Sequence[Sequence[Row]],
    learning_rate: float,
    pad: int,
    processes: int = 1,
    description: str = "pretraining",
) -> list[float]:
    """Train on every batch once; returns the loss (nats per predicted token) of every step.

    AdamW with warm-up and a cosine down to 5 % of `learning_rate`, on the model's device. The weights do not depend on
    the number of processes, see `shared_training`; two need the CPU. Within a half, long documents are padded apart
    from short ones.

    Raises:
        ValueError: a batch with less than two documents, or more than two processes.
    """
    if not 1 <= processes <= SHARDS or any(len(batch) < SHARDS for batch in batches):
        raise UserValueError(f"pretraining cuts every batch in {SHARDS}: got {processes} processes, or a smaller batch")
    training = functools.partial(_train, batches=batches, learning_rate=learning_rate, pad=pad, description=description)
    return train_shared(model, training, processes)


def shards(batch: Sequence[Row], pad: int) -> list[list[Group]]:
    """The two parts of a batch, of nearly equal length, each as one or two groups of similar rows."""
    ordered = sorted(batch, key=lambda row: len(row.tokens))
    return [_groups(ordered[part::SHARDS], pad) for part in range(SHARDS)]


def _groups(rows: list[Row], pad: int) -> list[Group]:
    """Rows in ascending length, cut in two where that saves the most padding, or left whole."""
    lengths = [len(row.tokens) for row in rows]

    def cost(cut: int) -> int:
        split = 0 if cut == 0 else cut * lengths[cut - 1] + _FORWARD_TOKENS
        return split + (len(rows) - cut) * lengths[-1]

    cut = min(range(len(rows)), key=cost)
    return [_pad(part, pad) for part in (rows[:cut], rows[cut:]) if part]


def _pad(rows: Sequence[Row], pad: int) -> Group:
    length = max(len(row.tokens) for row in rows)
    input_ids = torch.tensor([[*row.tokens, *[pad] * (length - len(row.tokens))] for row in rows])
    labels = input_ids.clone()
    for index, row in enumerate(rows):
        labels[index, : row.prompt] = IGNORED
        labels[index, len(row.tokens) :] = IGNORED
    return Group(input_ids, labels)


def _train(
    model: PreTrainedModel,
    batches: Sequence[Sequence[Row]],
    learning_rate: float,
    pad: int,
    description: str,
    *,
    rank: int | None,
) -> list[float]:
    """Train on all batches; with a rank, on its half of each, summing gradients over ranks."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine(step, len(batches), _WARMUP_STEPS, _FLOOR)
    )
    losses: list[Tensor] = []
    model.train()
    for batch in progress(batches, total=len(batches), description=description):
        predicted = sum(len(row.tokens) - row.prompt for row in batch)
        parts = shards(batch, pad)
        loss = torch.zeros((), device=model.device)
        for part in parts if rank is None else parts[rank : rank + 1]:
            # One backward a part: sums of gradients are then the same in one process and in two.
            share = torch.stack([_loss_sum(model, group) for group in part]).sum() / predicted
            share.backward()
            loss += share.detach()
        if rank is not None:
            sum_over_processes(parameters, loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss)
    model.eval()
    return torch.stack(losses).tolist()


def _loss_sum(model: PreTrainedModel, group: Group) -> Tensor:
    """Negative log-likelihood of the labels, summed. Padding is on the right, so causality alone keeps it out."""
    logits = model(input_ids=group.input_ids.to(model.device), use_cache=False).logits
    labels = group.labels[:, 1:].to(model.device)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
