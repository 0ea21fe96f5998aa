"""A matrix of shares as a heat map, for `report.html.Figure`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.plots import COLOURS
from qscope_posttrain.report.svg import INK, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUMBERS_UP_TO = 20
"""Rows of a matrix whose cells have room for their numbers."""


def heat_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], peak: float | None = None
) -> str:
    """A cell for every value, the deeper the colour the larger; the first row on top.

    Args:
        values: `[rows, columns]`, 0 or more; NaN leaves a cell empty.
        peak: the value of full colour; by default the largest one.

    Raises:
        ValueError: no values, or names of another number.
    """
    if not rows or len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise UserValueError(f"expected {len(rows)} rows of {len(columns)} values, at least one.")
    known = [value for row in values for value in row if math.isfinite(value)]
    full = max(known, default=1.0) if peak is None else peak

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if not math.isfinite(value):
                    continue
                share = min(max(value / full, 0.0), 1.0) if full > 0 else 0.0
                axes.add_patch(Rectangle((column, row), 1, 1, facecolor=COLOURS[0], alpha=0.85 * share, linewidth=0))
                if len(rows) <= _NUMBERS_UP_TO:
                    axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8.5)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks([column + 0.5 for column in range(len(columns))], columns, rotation=40, ha="right")
        axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set(visible=True, color=INK, alpha=0.25)

    return draw_svg(draw, width=1.8 + 0.56 * len(columns), height=1.3 + 0.42 * len(rows))
