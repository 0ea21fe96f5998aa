"""Plots of methods: bars with intervals, and gain against cost with an interval on each axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.plots import COLORS, DASHED, INK, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Bar:
    """One bar: its value, its interval, and the single measurements behind it (one per seed), drawn as dots."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    points: tuple[float, ...] = ()


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


def interval_bars(bars: Sequence[Bar], label: str, percent: bool = False, reference: str | None = None) -> str:
    """Draw horizontal bars with intervals, the first bar on top. `label` is that of the horizontal axis; with
    `percent`, values are shares in [0, 1], shown as per cent. The bar called `reference`, to which the others are
    compared, is gray, with a line through the plot."""
    if not bars:
        raise UserValueError("interval_bars needs at least one bar.")
    names = [bar.name for bar in bars]
    if reference is not None and reference not in names:
        raise UserValueError(f"no bar is called '{reference}'; the bars are {names}.")

    def draw(axes: Axes) -> None:
        for row, bar in enumerate(bars):
            color = COLORS[-1] if bar.name == reference else COLORS[0]
            axes.barh(row, bar.value, height=0.58, color=color, alpha=0.72, linewidth=0)
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [row, row], color=INK, linewidth=1.3, solid_capstyle="butt")
                axes.plot([bar.low, bar.high], [row, row], "|", color=INK, markersize=8, markeredgewidth=1.3)
            axes.plot(bar.points, [row + 0.17] * len(bar.points), "o", color=INK, markersize=3.2, alpha=0.5, mew=0)
            text = f"{100 * bar.value:.1f} %" if percent else f"{bar.value:.3g}"
            end = max(value for value in (bar.value, bar.high, *bar.points) if value is not None)
            axes.annotate(text, (end, row), (7, 0), textcoords="offset points", va="center", fontsize=9.5)
            if bar.name == reference:
                axes.axvline(bar.value, **DASHED)
        axes.set_yticks(range(len(bars)), names)
        axes.set_ylim(len(bars) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.12)

    return draw_svg(draw, (7.6, 0.85 + 0.36 * len(bars)), labels=(label, ""), percent=(percent, False))


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
