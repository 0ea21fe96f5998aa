"""Results that both tasks hand to the demo: sections, tables and artefacts, and their lines of the summary table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from benchmarks.testbed.plots import Bar, interval_bars
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval
from qscope_posttrain.report.html import Figure, Section
from qscope_posttrain.report.tables import Cell, Table


@dataclass(frozen=True)
class Example:
    """A prompt and its answers by method, side by side; characters of the Unicode script `highlight` are marked."""

    prompt: str
    answers: Mapping[str, str]
    highlight: str = ""

    def runs(self, answer: str) -> list[tuple[str, bool]]:
        """Split an answer into runs `(run, whether it is of the script)`, which joined are the answer."""
        if not self.highlight:
            return [(answer, False)]
        try:
            runs = regex.split(rf"(\p{{Script={self.highlight}}}+)", answer)
        except regex.error as error:
            raise UserValueError(f"'{self.highlight}' is no Unicode script name, such as Han, Cyrillic.") from error
        return [(run, place % 2 == 1) for place, run in enumerate(runs) if run]


@dataclass(frozen=True)
class DemoPart:
    """A finished experiment, ready for the report and the summary."""

    name: str
    headline: list[list[Cell]]
    """Its lines of the summary table, see `headline_row`."""
    note: str
    """Its part of the caption of the summary table."""
    sections: list[Section]
    """Of the report."""
    tables: Mapping[str, Table]
    """By name, for the summary file."""
    results: Mapping[str, Any]
    """JSON-ready numbers for the summary file."""
    artefacts: Mapping[str, Path]
    """Files that other commands read."""
    seeds: tuple[int, ...]


def headline_row(
    habit: str, title: str, rate: Interval, change: Interval | None, plain: str, quality: str, digits: int
) -> list[Cell]:
    """Return one line of the summary table.

    Args:
        habit: of the model.
        title: of the method.
        rate: share of answers with the habit.
        change: of that share against the plain method, with its 95 % interval; None for the plain method itself.
        plain: title of the plain method.
        quality: of the model after training.
    """
    share = f"{100 * rate.estimate:.{digits}f} %"
    if change is None:
        return [habit, title, share, None, "(compared with this)", quality]
    limits = f"{100 * change.estimate:+.{digits}f} ({100 * change.low:+.{digits}f} .. {100 * change.high:+.{digits}f})"
    if change.high < 0:
        before = rate.estimate - change.estimate
        found = f"yes: {-100 * change.estimate / before:.0f} % less than {plain}"
    else:
        found = "no: more of it" if change.low > 0 else "no difference shown"
    return [habit, title, share, limits, found, quality]


def headline_table(parts: Sequence[DemoPart]) -> Table:
    """Return the summary table of the demo."""
    columns = ["the model's bad habit", "trained with", "bad answers", "change, points (95 %)", "does it help?"]
    caption = (
        "Each line is a tiny model after the same amount of training; it differs from the others in the method only. "
        "Change: of the share of bad answers, against the plain method; a method helps if the whole 95 % interval is "
        "below 0. "
    )
    rows = [row for part in parts for row in part.headline]
    notes = " ".join(part.note for part in parts)
    return Table("In short: do the methods train the bad habit away?", [*columns, "quality"], rows, caption + notes)


def bars(entries: Iterable[tuple[str, Interval, Sequence[float]]], label: str, reference: str, caption: str) -> Figure:
    """Draw shares with their intervals and a dot per seed, beside the plain method's."""
    found = [Bar(title, rate.estimate, rate.low, rate.high, tuple(seeds)) for title, rate, seeds in entries]
    return Figure(interval_bars(found, label, percent=True, reference=reference), caption)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON objects, one per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
