"""Which tokens of a negative enter the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.text.repetition import RepeatedTail


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
