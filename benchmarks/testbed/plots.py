"""Scatter plots of methods: their gain against their cost, each with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.plots import COLORS, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Mark:
    """One point of a scatter, with an optional interval `(low, high)` on each axis."""

    name: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None

    def draw_intervals(self, axes: Axes, **style: Any) -> None:
        """Draw a line along each interval."""
        if self.x_interval is not None:
            axes.plot(self.x_interval, [self.y, self.y], solid_capstyle="butt", **style)
        if self.y_interval is not None:
            axes.plot([self.x, self.x], self.y_interval, solid_capstyle="butt", **style)


def scatter_with_intervals(
    marks: Sequence[Mark], x_label: str, y_label: str, x_percent: bool = False, y_percent: bool = False
) -> str:
    """Draw points with an interval on each axis, named in a legend: the gain of methods against their cost."""
    if not marks:
        raise UserValueError("scatter_with_intervals needs at least one point.")

    def draw(axes: Axes) -> None:
        for index, mark in enumerate(marks):
            color, shape = COLORS[index % len(COLORS)], "os^Dv"[index // len(COLORS) % 5]
            mark.draw_intervals(axes, color=color, linewidth=1.2, alpha=0.6)
            axes.plot(mark.x, mark.y, shape, color=color, markersize=7, mew=0, label=mark.name)
        axes.margins(0.09)

    return draw_svg(draw, (7.6, 4.4), labels=(x_label, y_label), percent=(x_percent, y_percent), legend=True)
