"""Final metrics of a GRPO training and their table, reported separately for ordinary and negative rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qscope_posttrain.report.tables import Table

LAST_ENTRIES = 10
"""Number of log entries at the end of training that final metrics are averaged over"""

_LINES = (
    ("reward", "reward", "reward"),
    ("length [tokens]", "length", "length"),
    ("share that repeats without end", "repeat_ratio", "looped"),
    ("advantage", "advantage", "advantage"),
    ("groups without a signal", "zero_std_groups", None),
    ("share kept in the loss", None, "kept"),
    ("share of tokens below the floor", None, "unlikely_tokens"),
    ("share of the gradient", None, "gradient_share"),
    ("log ratio of policy to behavior", None, "log_ratio"),
    ("rows in a batch", None, "rows"),
)
"""Line of the table, metric of ordinary rows, metric of negatives"""


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
