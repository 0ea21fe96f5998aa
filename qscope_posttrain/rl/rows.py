"""Rows of a generation batch: which are negatives, how they came out, and which of their tokens are in the loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor

from qscope_posttrain.text.repetition import RepeatedTail, repeated_tail


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Treatment of the rows of this process in one generation batch."""

    negative: Tensor  # [rows] bool, on the CPU
    start: Tensor  # [rows] int64: generated token at which steering or copying starts
    first: int  # Number of the first of these rows in the batch of all processes
    in_batch: bool  # Whether the batch holds a negative at all, on this process or another
    draw: int  # A number that belongs to this batch alone, for further draws (a random direction)
    whole: RowPlan | None = None  # The plan of the rows of all processes; None where these are all

    def part(self, first: int, rows: int) -> RowPlan:
        """The plan of `rows` rows of the same batch from number `first` on, whichever process has them."""
        whole = self.whole or self
        if not 0 <= first <= first + rows <= len(whole.negative):
            raise ValueError(f"rows {first} to {first + rows - 1} of a batch of {len(whole.negative)}")
        mine = slice(first, first + rows)
        negative, start = whole.negative[mine].clone(), whole.start[mine].clone()
        return RowPlan(negative, start, first, whole.in_batch, whole.draw, whole)


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
    window_start: tuple[int, int],
    seed: int,
    step: int,
    part: int = 0,
    attempt: int = 0,
) -> RowPlan:
    """Choose negatives by place: the last rows of each group of the batch of all processes.

    Everything drawn comes from (seed, step, part, attempt) and is drawn for the whole batch, so that processes agree
    without communication and the trainer's random state is left alone.

    Args:
        rows: rows of this process; every process has as many.
        window_start: first and last token at which a window may start, both included.
        step: optimizer step of the batch.
        part: number of the generation batch within that step.
        attempt: 0, or the number of the redraw under dynamic sampling.
    """
    generator = np.random.default_rng((seed % 2**32, step, part, attempt, 0))
    total = rows * num_processes
    generator.random()  # these two are not needed: they keep the windows of a seed what they are in published results
    generator.permutation(total // group_size)
    start = generator.integers(window_start[0], window_start[1] + 1, size=total)
    draw = int(generator.integers(2**31))
    negative = np.arange(total) % group_size >= group_size - negatives_per_group
    whole = RowPlan(torch.from_numpy(negative), torch.from_numpy(start), 0, bool(negative.any()), draw)
    return whole.part(process_index * rows, rows)


@dataclass(frozen=True, eq=False)
class RowFacts:
    """Facts of generated rows of one process, or of all of them; on the trainer's device, `[rows]` each."""

    negative: Tensor  # bool
    looped: Tensor  # bool: an endless repetition
    length: Tensor  # int64: tokens of the completion
    truncated: Tensor  # bool: the completion was cut at the length limit

    @classmethod
    def of(
        cls,
        completions: Sequence[Sequence[int]],
        tails: Sequence[RepeatedTail | None],
        negative: Tensor,
        end_tokens: Collection[int],
    ) -> RowFacts:
        """The facts of completions with these repeated tails, on the device of `negative` [rows]."""
        device = negative.device
        return cls(
            negative=negative,
            looped=torch.tensor([tail is not None for tail in tails], device=device),
            length=torch.tensor([len(ids) for ids in completions], device=device),
            truncated=torch.tensor([ids[-1] not in end_tokens for ids in completions], device=device),
        )

    def kept(self, gate: str) -> Tensor:
        """[rows] bool: ordinary rows, and the negatives that stay in the loss."""
        return ~self.negative | self.looped if gate == "drop" else torch.ones_like(self.negative)

    def gathered(self) -> RowFacts:
        """The facts of the rows of all processes, in their order."""
        table = gather(torch.stack([self.negative, self.looped, self.length, self.truncated], dim=1))
        return RowFacts(table[:, 0].bool(), table[:, 1].bool(), table[:, 2], table[:, 3].bool())


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """A generation batch after scoring."""

    tails: Sequence[RepeatedTail | None]  # Of each row of this process; None for a row that is no endless repetition
    mine: RowFacts  # Rows of this process
    everyone: RowFacts  # Rows of all processes
    rewards: Tensor  # [rows of all processes] total reward as the reward functions gave it; NaN for a row without one
    by_function: Tensor  # [rows of all processes, functions] the reward of each function


def total_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """[rows] weighted sum of `rewards` [rows, functions], leaving out NaN; NaN where all functions gave none."""
    total = (rewards * weights).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def find_tails(
    completions: Sequence[Sequence[int]],
    max_length: int,
    end_tokens: Collection[int],
    *,
    min_copies: int,
    min_tokens: int,
) -> list[RepeatedTail | None]:
    """The repeated tail of each completion that is an endless repetition: cut at `max_length` tokens without an end
    token, with a tail that repeats (see `text.repetition.is_endless_repetition`); None for the others."""
    tails: list[RepeatedTail | None] = []
    for ids in completions:
        is_cut = len(ids) >= max_length and ids[-1] not in end_tokens
        tails.append(repeated_tail(ids, min_copies=min_copies, min_tokens=min_tokens) if is_cut else None)
    return tails


def negative_loss_mask(
    completion_mask: Tensor, negative: Tensor, kept: Tensor, tails: Sequence[RepeatedTail | None], tokens: str
) -> Tensor:
    """[rows, length] like `completion_mask`: 1 where a token is in the loss.

    Ordinary rows keep their mask, negatives that are not `kept` [rows] lose theirs. Of the others, "all" keeps every
    token; "tail" those from the second copy of the repeated tail on, and all of them where there is none.
    """
    part = torch.ones_like(completion_mask, dtype=torch.bool)
    if tokens == "tail":
        column = torch.arange(part.shape[1], device=part.device)
        first = torch.tensor([0 if tail is None else tail.second_copy for tail in tails], device=part.device)
        part = column >= first[:, None]
    in_loss = torch.where(negative[:, None], part & kept[:, None], torch.ones_like(part))
    return completion_mask * in_loss.to(completion_mask.dtype)
