"""Progress of long loops: a bar on a terminal, plain lines in a log, silence on every rank but the first."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from qscope_posttrain.distributed import is_main_process

T = TypeVar("T")
Note = Callable[[], str] | None  # A few more words at each update
QUIET = "QSCOPE_QUIET"  # Environment variable that, unless it is empty, leaves progress and status lines out
MANY_ROWS = 100_000  # Rows from which on a pass over all of them shows its progress
SECONDS_BETWEEN_LINES = 5.0
"""Pause between plain lines: often enough to see that the loop lives, seldom enough for a log file."""


def progress(
    iterable: Iterable[T],
    total: int | None = None,
    description: str = "working",
    enabled: bool | None = None,
    note: Note = None,
) -> Iterator[T]:
    """Yield the items of `iterable` and show on standard error how far the loop is.

    `total` is by default `len(iterable)` where it has one; without it no share and no remaining time are shown. By
    default it is shown on rank 0, unless the environment has QSCOPE_QUIET; `enabled` is True or False to insist. `note`
    gives a few more words at each update, for example the current loss.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not _shown(enabled):
        yield from iterable
    elif sys.stderr.isatty():
        yield from _with_bar(iterable, total, description, note)
    else:
        yield from _with_lines(iterable, total, description, note)


def if_many(rows: int | None) -> bool | None:
    """Value of `enabled` for a pass over data: None (shown on rank 0) from MANY_ROWS rows on, else False."""
    return None if rows is not None and rows >= MANY_ROWS else False


def status(message: str, enabled: bool | None = None) -> None:
    """Print one plain line on standard error, under the same conditions as `progress`."""
    if _shown(enabled):
        _print_line(message)


def _shown(enabled: bool | None) -> bool:
    if not is_main_process():
        return False
    return not os.environ.get(QUIET) if enabled is None else enabled


def _with_bar(iterable: Iterable[T], total: int | None, description: str, note: Note) -> Iterator[T]:
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}", markup=False),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, note="")
        for item in iterable:
            yield item
            bar.update(task, advance=1, note=note() if note is not None else "")


def _with_lines(iterable: Iterable[T], total: int | None, description: str, note: Note) -> Iterator[T]:
    started = last_line = time.monotonic()
    done = 0
    _print_line(f"{description}: {_count(0, total)}")
    try:
        for item in iterable:
            yield item
            done += 1
            now = time.monotonic()
            if now - last_line >= SECONDS_BETWEEN_LINES and done != total:  # the end has a line of its own
                last_line, elapsed = now, now - started
                left = f"{_clock(elapsed / done * (total - done))} left" if total is not None and total > done else ""
                words = note() if note is not None else ""
                _print_line(f"{description}: {_count(done, total)}", _rate(done, elapsed), left, words)
    except (Exception, KeyboardInterrupt, GeneratorExit):
        _print_line(f"{description}: stopped after {_count(done, total)}")
        raise
    elapsed = time.monotonic() - started
    words = note() if note is not None and done else ""
    _print_line(f"{description}: {_count(done, total)} in {_clock(elapsed)}", _rate(done, elapsed), words)


def _print_line(*parts: str) -> None:
    print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


def _count(done: int, total: int | None) -> str:
    share = f" ({100 * done // total} %)" if total else ""
    return str(done) if total is None else f"{done}/{total}{share}"


def _rate(done: int, elapsed: float) -> str:
    if done == 0 or elapsed <= 0:
        return ""
    per_second = done / elapsed
    return f"{per_second:.3g}/s" if per_second >= 1 else f"{1 / per_second:.3g} s each"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
