"""Pretraining of the arithmetic model on documents of very different lengths, in one process or two."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qscope_posttrain.report.progress import progress

SHARDS = 2
"""Parts of a batch whose gradients are summed, and so the most processes that can share the work."""

IGNORED = -100
"""Label of a token that is not predicted."""

_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.01
_WARMUP_STEPS = 50
_FLOOR = 0.05
_RESULT = "result.pt"
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

    AdamW with warm-up and a cosine down to 5 % of `learning_rate`. A batch is always cut in two and the gradients of
    both halves are summed, in one process or in two with a thread each, so that the weights do not depend on the number
    of processes. Within a half, long documents are padded apart from short ones.

    Raises:
        ValueError: a batch with less than two documents, or more than two processes.
    """
    if not 1 <= processes <= SHARDS or any(len(batch) < SHARDS for batch in batches):
        raise ValueError(f"pretraining cuts every batch in {SHARDS}: got {processes} processes, or a smaller batch")
    if processes == 1:
        return _train(model, batches, learning_rate, pad, description)
    with tempfile.TemporaryDirectory(prefix="qscope-pretraining-") as folder:
        arguments = (model, batches, learning_rate, pad, description, folder)
        multiprocessing.spawn(_worker, arguments, nprocs=processes)
        result = torch.load(Path(folder) / _RESULT, weights_only=True)
    model.load_state_dict(result["weights"])
    model.eval()
    return list(result["losses"])


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


def _worker(
    rank: int,
    model: PreTrainedModel,
    batches: Sequence[Sequence[Row]],
    learning_rate: float,
    pad: int,
    description: str,
    folder: str,
) -> None:
    """One of two processes; the first writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SHARDS)
    try:
        model = copy.deepcopy(model)  # what arrives lies in memory that both processes share
        losses = _train(model, batches, learning_rate, pad, description, rank)
        if rank == 0:
            torch.save({"weights": model.state_dict(), "losses": losses}, Path(folder) / _RESULT)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _train(
    model: PreTrainedModel,
    batches: Sequence[Sequence[Row]],
    learning_rate: float,
    pad: int,
    description: str,
    rank: int | None = None,
) -> list[float]:
    """Train on all batches; with a rank, on its half of each, summing gradients over ranks."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, len(batches)))
    losses: list[Tensor] = []
    model.train()
    for batch in progress(batches, total=len(batches), description=description):
        predicted = sum(len(row.tokens) - row.prompt for row in batch)
        parts = shards(batch, pad)
        loss = torch.zeros(())
        for part in parts if rank is None else parts[rank : rank + 1]:
            # One backward a part: sums of gradients are then the same in one process and in two.
            share = torch.stack([_loss_sum(model, group) for group in part]).sum() / predicted
            share.backward()
            loss += share.detach()
        if rank is not None:
            _sum_over_processes(parameters, loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss)
    model.eval()
    return torch.stack(losses).tolist()


def _loss_sum(model: PreTrainedModel, group: Group) -> Tensor:
    """Negative log-likelihood of the labels, summed. Padding is on the right, so causality alone keeps it out."""
    logits = model(input_ids=group.input_ids, use_cache=False).logits
    labels = group.labels[:, 1:]
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


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
    """Linear warm-up, then a cosine down to 5 % of the peak."""
    warm = min(1.0, (step + 1) / _WARMUP_STEPS)
    done = min(1.0, max(0.0, (step - _WARMUP_STEPS) / max(1, steps - _WARMUP_STEPS)))
    return warm * (_FLOOR + (1 - _FLOOR) * 0.5 * (1.0 + math.cos(math.pi * done)))
