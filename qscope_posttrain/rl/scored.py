"""What is known of the rows of a generation batch once they are generated and scored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather
from torch import Tensor

from qscope_posttrain.text.repetition import RepeatedTail, repeated_tail


@dataclass(frozen=True, eq=False)
class RowFacts:
    """Facts of the rows of one process, or of all of them; on the trainer's device."""

    negative: Tensor
    """[rows] bool"""
    looped: Tensor
    """[rows] bool: an endless repetition"""
    length: Tensor
    """[rows] int64: tokens of the completion"""
    truncated: Tensor
    """[rows] bool: the completion was cut at the length limit"""

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
        """[rows] bool: ordinary rows, and the negatives that pass the gate."""
        return ~self.negative | self.looped if gate == "drop" else torch.ones_like(self.negative)

    def gathered(self) -> RowFacts:
        """The facts of the rows of all processes, in their order."""
        table = gather(torch.stack([self.negative, self.looped, self.length, self.truncated], dim=1))
        return RowFacts(table[:, 0].bool(), table[:, 1].bool(), table[:, 2], table[:, 3].bool())


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """A generation batch after scoring."""

    tails: Sequence[RepeatedTail | None]
    """Of each row of this process; None for a row that is no endless repetition"""
    mine: RowFacts
    """Rows of this process"""
    everyone: RowFacts
    """Rows of all processes"""
    rewards: Tensor
    """[rows of all processes] total reward as the reward functions gave it; NaN for a row without one"""
    by_function: Tensor
    """[rows of all processes, functions] what each of them gave"""


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
    """The repeated tail of each completion that is an endless repetition; None for the others.

    Endless: the completion was cut at `max_length` tokens without an end token, and its tail repeats. The definition
    is that of `text.repetition.is_endless_repetition`.
    """
    tails: list[RepeatedTail | None] = []
    for ids in completions:
        is_cut = len(ids) >= max_length and ids[-1] not in end_tokens
        tails.append(repeated_tail(ids, min_copies=min_copies, min_tokens=min_tokens) if is_cut else None)
    return tails


def dead_groups(rewards: Tensor, negative: Tensor, group_size: int) -> Tensor:
    """[groups] bool: the ordinary rows of the group all have the same reward, so that none of them teaches anything.

    Rows without a reward (NaN) do not count. DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) keeps the groups
    with 0 < right answers < G; a steered row is left out of the count, or it would bring every group to life.

    Args:
        rewards: [rows] of whole groups, one after the other.
        negative: [rows] bool.
        group_size: rows in a group.
    """
    grouped = rewards.masked_fill(negative, torch.nan).view(-1, group_size)
    highest = grouped.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest = grouped.nan_to_num(nan=torch.inf).amin(dim=1)
    return ~(highest > lowest) | torch.isclose(highest, lowest)


def excluded_advantages(rewards: Tensor, negative: Tensor, group_size: int, scale: bool) -> Tensor:
    """Advantages [rows] of negatives compared with the ordinary rows of their group; 0 for ordinary rows.

    With R the reward of the negative, m the mean reward of the ordinary rows of its group and G the group size:

        A = (G - 1) / sqrt(G) * clamp(R - m, -1, 1)     (scale)
        A = R - m                                       (not scale)

    Dividing by the ordinary rows' standard deviation, as for an ordinary row, would blow A up whenever they agree. The
    factor is the size that the usual normalisation gives to one row below G - 1 equal ones, whatever the gap.

    Args:
        rewards: [rows] total rewards of whole groups, one group after the other; NaN for a row without one.
        negative: [rows] bool.
        group_size: rows in a group.
        scale: whether advantages are scaled by a standard deviation at all (`scale_rewards` is not "none").
    """
    grouped = rewards.view(-1, group_size)
    ordinary = grouped.masked_fill(negative.view(-1, group_size), torch.nan)
    gap = grouped - ordinary.nanmean(dim=1, keepdim=True)
    if scale:
        gap = (group_size - 1) / group_size**0.5 * gap.clamp(-1.0, 1.0)
    advantages = gap.nan_to_num(nan=0.0).flatten()
    return torch.where(negative, advantages, torch.zeros_like(advantages))
