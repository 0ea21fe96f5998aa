"""Rows and pairs of runs by cell and by base model, for both kinds of experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar


class _Row(Protocol):
    @property
    def cell(self) -> str: ...

    @property
    def base(self) -> int: ...


class _Pair(Protocol):
    @property
    def run(self) -> Any: ...


Row = TypeVar("Row", bound=_Row)
Pair = TypeVar("Pair", bound=_Pair)


def by_cell(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each cell, in the order of their first appearance."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row.cell, []).append(row)
    return cells


def by_base(pairs: Iterable[Pair], value: Callable[[Pair], float]) -> dict[int, list[float]]:
    """`value(pair)` of each run and its reference, grouped by base model, for `clustered_interval`."""
    grouped: dict[int, list[float]] = {}
    for pair in pairs:
        grouped.setdefault(pair.run.base, []).append(value(pair))
    return grouped
