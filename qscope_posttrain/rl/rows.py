"""Which rows of a generation batch are negatives, and where their windows start: decided alike on every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.text.repetition import RepeatedTail


@dataclass(frozen=True, eq=False)
class RowPlan:
    """What becomes of the rows of this process in one generation batch."""

    negative: Tensor
    """[rows] bool, on the CPU"""
    start: Tensor
    """[rows] int64: generated token at which steering or copying starts"""
    first: int
    """Number of the first of these rows in the batch of all processes"""
    in_batch: bool
    """Whether the batch holds a negative at all, on this process or another"""
    draw: int
    """A number that belongs to this batch alone, for further draws (a random direction)"""


def ordinary_plan(rows: int) -> RowPlan:
    """No negatives: evaluation, and plain DAPO."""
    return RowPlan(torch.zeros(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.long), 0, False, 0)


def plan_rows(
    rows: int,
    *,
    process_index: int,
    num_processes: int,
    group_size: int,
    negatives_per_group: int,
    share: float,
    window_start: tuple[int, int],
    seed: int,
    step: int,
    part: int = 0,
    attempt: int = 0,
) -> RowPlan:
    """Choose negatives by place: the last rows of each group, and of `share` of the groups.

    A row's place is its number in the generation batch of all processes, `process_index * rows + i`, modulo the group
    size. Everything drawn comes from (seed, step, part, attempt) and is drawn for the whole batch, so that processes
    agree without a word and the trainer's random state is left alone.

    Args:
        rows: rows of this process; every process has as many.
        share: of the groups; a fraction of a group is rounded up or down at random, so that the mean is exact.
        window_start: first and last token at which a window may start, both included.
        step: optimiser step of the batch.
        part: which of several generation batches of that step.
        attempt: 0, or the number of the redraw under dynamic sampling.
    """
    generator = np.random.default_rng((seed % 2**32, step, part, attempt, 0))
    total = rows * num_processes
    groups = total // group_size
    wanted = groups * share
    chosen = int(wanted) + int(generator.random() < wanted - int(wanted))
    holds = np.zeros(groups, dtype=bool)
    holds[generator.permutation(groups)[:chosen]] = True
    start = generator.integers(window_start[0], window_start[1] + 1, size=total)
    draw = int(generator.integers(2**31))

    place = np.arange(total)
    negative = (place % group_size >= group_size - negatives_per_group) & holds[place // group_size]
    mine = slice(process_index * rows, (process_index + 1) * rows)
    return RowPlan(
        negative=torch.from_numpy(negative[mine].copy()),
        start=torch.from_numpy(start[mine].copy()),
        first=process_index * rows,
        in_batch=bool(negative.any()),
        draw=draw,
    )


def negative_loss_mask(
    completion_mask: Tensor,
    negative: Tensor,
    kept: Tensor,
    tails: Sequence[RepeatedTail | None],
    tokens: str,
    *,
    policy_logps: Tensor | None = None,
    floor: float = 1e-3,
) -> Tensor:
    """[rows, length] like `completion_mask`: 1 where a token is in the loss.

    Ordinary rows keep their mask. Of a negative that is kept, "all" keeps every token; "tail" those from the second
    copy of its repeated tail on, and all of them where it has none; "likely" those to which the policy gives at
    least `floor`. A negative that is not kept has no token in the loss.

    Args:
        completion_mask: [rows, length] 1 for the tokens of each completion.
        negative: [rows] bool.
        kept: [rows] bool; read for negatives only.
        tails: of each row, as `text.repetition.repeated_tail` gives it.
        tokens: "all", "tail" or "likely".
        policy_logps: [rows, length], needed for "likely".
    """
    mask = completion_mask.clone()
    if tokens == "tail":
        column = torch.arange(mask.shape[1], device=mask.device)
        first = torch.tensor([0 if tail is None else tail.second_copy for tail in tails], device=mask.device)
        part = column >= first[:, None]
    elif tokens == "likely":
        if policy_logps is None:
            raise UserValueError("negative_tokens='likely' needs the log-probabilities of the policy.")
        part = policy_logps.exp() >= floor
    else:
        part = torch.ones_like(mask, dtype=torch.bool)
    in_loss = torch.where(negative[:, None], part & kept[:, None], torch.ones_like(part))
    return mask * in_loss.to(mask.dtype)
