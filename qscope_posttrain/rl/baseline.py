"""The advantage of a negative that is not part of its group's statistics."""

from __future__ import annotations

import torch
from torch import Tensor


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
