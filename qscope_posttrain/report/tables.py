"""One table, shown three ways: on a terminal, in Markdown, in JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserValueError

if TYPE_CHECKING:
    from rich.console import Console

Cell = str | int | float | bool | None  # Content of a cell; None and NaN mean "not measured" and are shown as a dash
MISSING = "-"


@dataclass(frozen=True, init=False)
class Table:
    """A titled table of plain values, with a caption that explains the columns; lists are stored as tuples."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def __init__(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> None:
        stored = {"title": title, "columns": tuple(columns), "rows": tuple(map(tuple, rows)), "caption": caption}
        for name, value in stored.items():
            object.__setattr__(self, name, value)
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise UserValueError(
                    f"row {number} of table '{title}' has {len(row)} cells for {len(self.columns)} columns: {row}."
                )

    def print(self, console: Console | None = None, markdown: bool = False) -> None:
        """Print the table with rich, on standard output unless a console is given; or its Markdown."""
        if markdown:
            print(self.to_markdown())
            return
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        caption = Text(self.caption) if self.caption else None
        shown = RichTable(title=Text(self.title), caption=caption, title_justify="left", caption_justify="left")
        for index, column in enumerate(self.columns):
            shown.add_column(Text(column), justify="right" if self.is_numeric(index) else "left", overflow="fold")
        for row in self.formatted():
            shown.add_row(*(Text(cell) for cell in row))  # Text: a square bracket in a cell is no rich markup
        if console is None:
            console = Console()
            if not console.is_terminal:  # a log or a pipe has no width; wrapping at 80 columns would cut cells
                console = Console(width=max(console.width, 160))
        console.print(shown)

    def to_markdown(self) -> str:
        """The table as GitHub-flavored Markdown, with its title as a bold line and its caption below."""
        marks = ["---:" if self.is_numeric(index) else "---" for index in range(len(self.columns))]
        rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in self.formatted()]
        lines = [f"**{self.title}**", ""] if self.title else []
        lines += [f"| {' | '.join(row)} |" for row in (self.columns, marks, *rows)]
        lines += ["", self.caption] if self.caption else []
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: title, columns, rows with full precision (NaN and infinities become None), caption."""
        rows = [
            [None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row] for row in self.rows
        ]
        return {"title": self.title, "columns": list(self.columns), "rows": rows, "caption": self.caption}

    def formatted(self) -> tuple[tuple[str, ...], ...]:
        """The rows as text: numbers with four significant digits."""
        return tuple(tuple(format_cell(cell) for cell in row) for row in self.rows)

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers only (missing values aside), and so is aligned to the right."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)


def format_cell(cell: Cell) -> str:
    """One cell as text: four significant digits for a float, yes/no for a truth value, a dash for None and NaN."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return MISSING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)
