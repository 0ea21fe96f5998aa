"""Metrics of a training and the table of its results, reported separately for ordinary rows and negatives."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.distributed import is_main_process
from qscope_posttrain.report.tables import Table
from qscope_posttrain.rl.dynamic_sampling import dead_groups
from qscope_posttrain.rl.rows import RowFacts

UNLIKELY = 1e-3  # Probability below which a token counts for `negative/unlikely_tokens`
LAST_ENTRIES = 10
"""Number of log entries at the end of training that final metrics are averaged over"""

IDLE_BATCHES = 20
"""Batches without any effect of negatives after which a warning says so"""
NOTHING = 1e-3  # Nats per token, or share of negatives, that count as none
_IDLE = {
    "negative/kept": (
        "the gate drops every negative, because none is an endless repetition, and this is plain DAPO with smaller "
        "groups. Early in a training, provoke loops: another steering_strength, a longer window, more copies, a larger "
        "max_completion_length, or gate='keep'. Late in one, the model may have lost the habit."
    ),
    "negative/log_ratio": (
        "the policy gives the tokens of negatives the probability with which they were drawn, so that nothing makes "
        "them negatives. Raise steering_strength or window_length, or steer with other features or another layer."
    ),
}
"""Metrics that are 0 where negatives change nothing, and what to do"""

_LINES = (
    ("reward", "reward", "reward"),
    ("length [tokens]", "length", "length"),
    ("share that repeats without end", "repeat_ratio", "looped"),
    ("advantage", "advantage", "advantage"),
    ("groups without a signal", "zero_std_groups", None),
    ("share kept in the loss", None, "kept"),
    (f"share of tokens below {UNLIKELY:.1%}", None, "unlikely_tokens"),
    ("share of the gradient", None, "gradient_share"),
    ("log ratio of policy to behavior", None, "log_ratio"),
    ("rows in a batch", None, "rows"),
)
"""Line of the table, metric of ordinary rows, metric of negatives"""


def row_metrics(
    facts: RowFacts, kept: Tensor, rewards: Tensor, advantages: Tensor, group_size: int
) -> dict[str, float]:
    """`ordinary/...` and, where there are negatives, `negative/...` of a generation batch of all processes.

    `kept` is [rows] bool, `rewards` [rows] are totals, NaN for a row without one, `advantages` [rows] those of the
    loss; `negative/advantage` is the mean over the kept negatives.
    """

    def mean(values: Tensor, rows: Tensor) -> Tensor:
        return values[rows].float().nanmean()

    negative, ordinary = facts.negative, ~facts.negative
    measured = {
        "ordinary/reward": mean(rewards, ordinary),
        "ordinary/length": mean(facts.length, ordinary),
        "ordinary/repeat_ratio": mean(facts.looped, ordinary),
        "ordinary/advantage": mean(advantages, ordinary),
        "ordinary/zero_std_groups": dead_groups(rewards, negative, group_size).float().mean(),
        "negative/rows": negative.sum().float(),
    }
    if bool(negative.any()):
        measured |= {
            "negative/reward": mean(rewards, negative),
            "negative/length": mean(facts.length, negative),
            "negative/looped": mean(facts.looped, negative),
            "negative/kept": mean(kept, negative),
            "negative/advantage": mean(advantages, negative & kept),
        }
    return {name: float(value) for name, value in measured.items()}


def token_sums(logps: Tensor, pull: Tensor, behavior: Tensor, completion_mask: Tensor, negative: Tensor) -> Tensor:
    """[5] sums over the tokens of a micro-batch, from which `token_metrics` follow; nothing leaves the device.

    With p the policy's probability of a token: the negatives' tokens, those of them with p < `UNLIKELY`, their sum of
    log p - log(behavior), and the sum of |d loss / d log p| (1 - p) over the tokens of negatives and of all rows: the
    size of the gradient of the loss with respect to the logit of the token. It is 0 where the ratio is clipped.

    Args:
        logps: [rows, length] of the policy that is trained, without gradient.
        pull: [rows, length] gradient of the loss with respect to `logps`.
        behavior: [rows, length] of the distribution the tokens were drawn from, read for negatives only; NaN where it
            is not known, which makes the sum NaN.
        completion_mask: [rows, length].
        negative: [rows] bool.
    """
    logps, own = logps.float(), (completion_mask.bool() & negative[:, None]).float()
    probability = logps.exp()
    size = pull.float().abs() * (1 - probability)
    return torch.stack(
        [
            own.sum(),
            (own * (probability < UNLIKELY)).sum(),
            torch.where(own.bool(), logps - behavior, 0.0).sum(),
            (size * negative[:, None]).sum(),
            size.sum(),
        ]
    )


def token_metrics(sums: Tensor) -> dict[str, float]:
    """`negative/unlikely_tokens`, `negative/log_ratio`, `negative/gradient_share` from the summed `token_sums`.

    The log ratio is left out where the distribution that tokens were drawn from is not known.
    """
    tokens, unlikely, log_ratio, own_pull, pull = sums.tolist()
    if tokens == 0:
        return {}
    measured = {
        "negative/unlikely_tokens": unlikely / tokens,
        "negative/log_ratio": log_ratio / tokens,
        "negative/gradient_share": own_pull / pull if pull > 0 else 0.0,
    }
    return {name: value for name, value in measured.items() if not math.isnan(value)}


class NegativeWatch:
    """Warns on the main process, once of each kind, of negatives that have changed nothing for `IDLE_BATCHES`."""

    def __init__(self) -> None:
        self._idle = dict.fromkeys(_IDLE, 0)

    def look(self, values: Mapping[str, float]) -> None:
        """Look at the metrics of a further generation batch or step; those of `_IDLE` that it has."""
        for name in _IDLE.keys() & values.keys():
            if self._idle[name] == IDLE_BATCHES:
                continue  # said
            self._idle[name] = self._idle[name] + 1 if abs(values[name]) < NOTHING else 0
            if self._idle[name] == IDLE_BATCHES and is_main_process():
                warnings.warn(f"{name} has been 0 in {IDLE_BATCHES} batches in a row: {_IDLE[name]}", stacklevel=2)


def overwrite_last(logged: Any, values: Tensor) -> None:
    """Replace the last entries of a column of the completions table, a deque that may be shorter than `values`."""
    for row, value in enumerate(values.tolist(), start=len(logged) - len(values)):
        if row >= 0:
            logged[row] = value


def final_metrics(log: Sequence[Mapping[str, Any]], last: int = LAST_ENTRIES) -> dict[str, float]:
    """Average every training metric over the last log entries that have it; NaN where none has a number."""
    found: dict[str, list[float]] = {}
    for entry in log:
        if not _is_step(entry):
            continue
        for name, value in entry.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, []).append(float(value))
    return {name: _mean(values[-last:]) for name, values in found.items() if name not in ("epoch", "step")}


def results_table(log: Sequence[Mapping[str, Any]], last: int = LAST_ENTRIES) -> Table:
    """Table with one line per quantity, and a column each for ordinary rows and negatives."""
    final = final_metrics(log, last)
    lines = []
    for title, ordinary, negative in _LINES:
        cells = [final.get(f"ordinary/{ordinary}"), final.get(f"negative/{negative}")]
        if any(cell is not None for cell in cells):
            lines.append([title, *cells])
    entries = min(last, sum(map(_is_step, log)))
    return Table(
        "Ordinary rows and negatives",
        ["", "ordinary", "negative"],
        lines,
        f"Means over the last {entries} log entries of training; a dash where there is nothing to measure.",
    )


def _is_step(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of the log is one of training, not of evaluation nor the totals at the end."""
    return "loss" in entry


def _mean(values: Sequence[float]) -> float:
    numbers = [value for value in values if math.isfinite(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan
