"""What a user wants to see of ordinary rows and of negatives, apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.rl.scored import RowFacts, dead_groups


def row_metrics(
    facts: RowFacts, kept: Tensor, rewards: Tensor, advantages: Tensor, group_size: int
) -> dict[str, float]:
    """Metrics of a generation batch from the rows of all processes.

    Args:
        facts: of all rows.
        kept: [rows] bool.
        rewards: [rows] total rewards, NaN for a row without one.
        advantages: [rows] as they enter the loss.
        group_size: rows in a group.

    Returns:
        `ordinary/...` and, where there are negatives, `negative/...`. `negative/advantage` is that of the kept ones.
    """
    negative, ordinary = facts.negative, ~facts.negative
    measured = {
        "ordinary/reward": _mean(rewards, ordinary),
        "ordinary/length": _mean(facts.length, ordinary),
        "ordinary/repeat_ratio": _mean(facts.looped, ordinary),
        "ordinary/advantage": _mean(advantages, ordinary),
        "ordinary/zero_std_groups": dead_groups(rewards, negative, group_size).float().mean(),
        "negative/rows": negative.sum().float(),
    }
    if bool(negative.any()):
        measured |= {
            "negative/reward": _mean(rewards, negative),
            "negative/length": _mean(facts.length, negative),
            "negative/looped": _mean(facts.looped, negative),
            "negative/kept": _mean(kept, negative),
            "negative/advantage": _mean(advantages, negative & kept),
        }
    return {name: float(value) for name, value in measured.items()}


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    return values[rows].float().nanmean()


def token_sums(
    logps: Tensor, pull: Tensor, behaviour: Tensor, completion_mask: Tensor, negative: Tensor, floor: float,
) -> Tensor:  # fmt: skip
    """[5] sums over the tokens of a micro-batch, from which `token_metrics` follow; nothing leaves the device.

    With p the policy's probability of a token: the negatives' tokens, those of them with p < `floor`, their sum of
    log p - log(behaviour), and the sum of |d loss / d log p| (1 - p) over the tokens of negatives and of all rows: the
    size of the gradient of the loss with respect to the logit of the token. It is 0 where the ratio is clipped.

    Args:
        logps: [rows, length] of the policy that is trained, without gradient.
        pull: [rows, length] gradient of the loss with respect to `logps`.
        behaviour: [rows, length] of the distribution the tokens were drawn from; read for negatives only.
        completion_mask: [rows, length].
        negative: [rows] bool.
        floor: probability below which a token counts as unlikely.
    """
    logps, own = logps.float(), (completion_mask.bool() & negative[:, None]).float()
    probability = logps.exp()
    size = pull.float().abs() * (1 - probability)
    return torch.stack(
        [
            own.sum(),
            (own * (probability < floor)).sum(),
            (own * (logps - behaviour)).sum(),
            (size * negative[:, None]).sum(),
            size.sum(),
        ]
    )


def token_metrics(sums: Tensor) -> dict[str, float]:
    """`negative/unlikely_tokens`, `negative/log_ratio`, `negative/gradient_share` from the summed `token_sums`."""
    tokens, unlikely, log_ratio, own_pull, pull = sums.tolist()
    if tokens == 0:
        return {}
    return {
        "negative/unlikely_tokens": unlikely / tokens,
        "negative/log_ratio": log_ratio / tokens,
        "negative/gradient_share": own_pull / pull if pull > 0 else 0.0,
    }


def overwrite_last(logged: Any, values: Tensor) -> None:
    """Replace the last entries of a column of the completions table, a deque that may be shorter than `values`."""
    for row, value in enumerate(values.tolist(), start=len(logged) - len(values)):
        if row >= 0:
            logged[row] = value
