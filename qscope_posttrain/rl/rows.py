"""Which rows of a generation batch are negatives, and where their windows start: decided alike on every process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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
