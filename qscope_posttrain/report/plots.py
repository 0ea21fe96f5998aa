"""Plots as inline SVG: interval bars, curves with bands, gain against cost. matplotlib is imported on first use.

Every function takes numbers and returns one `<svg>` element as a string, for `report.html.Figure`. Axes and text are
drawn in `currentColor` and text stays text, so that a figure follows the reader's light or dark theme and fonts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.svg import INK, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLOURS = ("#3f7fd0", "#df7f3b", "#2f9e77", "#b062b3", "#c59f1d", "#d3545f", "#56a5c4", "#8c8c8c")
"""Middle tones that hold on white and on near-black paper."""

_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Bar:
    """One bar: its value, its interval, and the single measurements behind it (one a seed), drawn as dots."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    points: tuple[float, ...] = ()


@dataclass(frozen=True)
class Curve:
    """One curve `y` over `x`, with an optional band from `low` to `high`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise UserValueError(f"curve '{self.name}' has one edge of a band; give both `low` and `high`, or neither.")
        lengths = {len(values) for values in (self.x, self.y, self.low, self.high) if values is not None}
        if len(lengths) != 1:
            raise UserValueError(f"curve '{self.name}' has series of different lengths: {sorted(lengths)}.")


@dataclass(frozen=True)
class Mark:
    """One point of a scatter, with an optional interval `(low, high)` on each axis."""

    name: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class CostCurve:
    """Gain of one method at each cost: points in the order of its coefficient, a line from (0, 0) through them."""

    name: str
    marks: Sequence[Mark]
    """Their names are not shown."""
    dashed: bool = False

    def __post_init__(self) -> None:
        if not self.marks:
            raise UserValueError(f"curve '{self.name}' has no points.")


def interval_bars(bars: Sequence[Bar], label: str, percent: bool = False, reference: str | None = None) -> str:
    """Horizontal bars with intervals, the first bar on top.

    Args:
        label: What the horizontal axis measures.
        percent: The values are shares in [0, 1]; the axis shows per cent.
        reference: Name of the bar to which the others are compared: it is grey, with a line through the plot.

    Raises:
        ValueError: no bars, or no bar of the name `reference`.
    """
    if not bars:
        raise UserValueError("interval_bars needs at least one bar.")
    names = [bar.name for bar in bars]
    if reference is not None and reference not in names:
        raise UserValueError(f"no bar is called '{reference}'; the bars are {names}.")

    def draw(axes: Axes) -> None:
        for row, bar in enumerate(bars):
            colour = COLOURS[-1] if bar.name == reference else COLOURS[0]
            axes.barh(row, bar.value, height=0.58, color=colour, alpha=0.72, linewidth=0)
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [row, row], color=INK, linewidth=1.3, solid_capstyle="butt")
                axes.plot([bar.low, bar.high], [row, row], "|", color=INK, markersize=8, markeredgewidth=1.3)
            axes.plot(bar.points, [row + 0.17] * len(bar.points), "o", color=INK, markersize=3.2, alpha=0.5, mew=0)
            text = f"{100 * bar.value:.1f} %" if percent else f"{bar.value:.3g}"
            end = max(value for value in (bar.value, bar.high, *bar.points) if value is not None)
            axes.annotate(text, (end, row), (7, 0), textcoords="offset points", va="center", fontsize=9.5)
            if bar.name == reference:
                axes.axvline(bar.value, color=INK, linewidth=0.8, alpha=0.45, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(bars)), names)
        axes.set_ylim(len(bars) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.12)
        axes.grid(axis="x")
        axes.set_xlabel(label)
        if percent:
            _percent(axes.xaxis)

    return draw_svg(draw, width=7.6, height=0.85 + 0.36 * len(bars))


def line_curves(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    percent: bool = False,
    x_marks: Sequence[float] | None = None,
) -> str:
    """Curves with optional bands on common axes, with a legend at the right.

    Args:
        log_y: Logarithmic vertical axis, for losses and perplexities that fall over decades.
        percent: The values are shares in [0, 1]; the vertical axis shows per cent.
        x_marks: Positions, above 0, to mark on a logarithmic horizontal axis; None leaves it linear.

    Raises:
        ValueError: no curves.
    """
    if not curves:
        raise UserValueError("line_curves needs at least one curve.")
    from matplotlib.ticker import MaxNLocator, NullLocator

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            colour = COLOURS[index % len(COLOURS)]
            dashes = "-" if index < len(COLOURS) else "--"
            axes.plot(curve.x, curve.y, dashes, color=colour, linewidth=1.7, label=curve.name)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
        if log_y:
            axes.set_yscale("log")
        if x_marks is not None:
            axes.set_xscale("log")
            axes.set_xticks(x_marks, [f"{mark:g}" for mark in x_marks])
            axes.xaxis.set_minor_locator(NullLocator())
        elif all(float(x).is_integer() for curve in curves for x in curve.x):
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))  # no step 1.5
        axes.grid(axis="both")
        axes.margins(x=0.01)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if percent:
            _percent(axes.yaxis)
        if len(curves) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return draw_svg(draw, width=7.6, height=3.5)


def scatter_with_intervals(
    marks: Sequence[Mark], x_label: str, y_label: str, x_percent: bool = False, y_percent: bool = False
) -> str:
    """Points with an interval on each axis and their names beside them: what a method gains against what it costs.

    Raises:
        ValueError: no points.
    """
    if not marks:
        raise UserValueError("scatter_with_intervals needs at least one point.")

    def draw(axes: Axes) -> None:
        for index, mark in enumerate(marks):
            colour = COLOURS[index % len(COLOURS)]
            line: dict[str, Any] = {"color": colour, "linewidth": 1.2, "alpha": 0.6, "solid_capstyle": "butt"}
            if mark.x_interval is not None:
                axes.plot(mark.x_interval, [mark.y, mark.y], **line)
            if mark.y_interval is not None:
                axes.plot([mark.x, mark.x], mark.y_interval, **line)
            axes.plot(mark.x, mark.y, "o", color=colour, markersize=7, mew=0)
        axes.grid(axis="both")
        axes.margins(0.09)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if x_percent:
            _percent(axes.xaxis)
        if y_percent:
            _percent(axes.yaxis)
        _name_marks(axes, marks)

    return draw_svg(draw, width=7.6, height=4.4)


def cost_curves(
    curves: Sequence[CostCurve], x_label: str, y_label: str, budgets: Sequence[float] = (), x_limit: float | None = None
) -> str:
    """Gain against cost, one line a method from the reference at (0, 0), with markers and intervals at its points.

    Values are shares; both axes show per cent. Intervals may leave the plot: the points decide on the axes.

    Args:
        budgets: Costs at which a vertical line is drawn.
        x_limit: Largest cost shown; lines that go on leave the plot there.

    Raises:
        ValueError: no curves.
    """
    if not curves:
        raise UserValueError("cost_curves needs at least one curve.")

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            colour = COLOURS[index % len(COLOURS)]
            marker = _MARKERS[(index // len(COLOURS) + index) % len(_MARKERS)]
            bars: dict[str, Any] = {"color": colour, "linewidth": 1.0, "alpha": 0.45, "solid_capstyle": "butt"}
            for mark in curve.marks:
                if mark.x_interval is not None:
                    axes.plot(mark.x_interval, [mark.y, mark.y], **bars)
                if mark.y_interval is not None:
                    axes.plot([mark.x, mark.x], mark.y_interval, **bars)
            x, y = [0.0, *(mark.x for mark in curve.marks)], [0.0, *(mark.y for mark in curve.marks)]
            line = axes.plot(x, y, "--" if curve.dashed else "-", color=colour, linewidth=1.5, label=curve.name)[0]
            line.set(marker=marker, markersize=6, markeredgewidth=1.2, markevery=slice(1, None))
            line.set_markerfacecolor("none" if curve.dashed else colour)
        for budget in budgets:
            axes.axvline(budget, color=INK, linewidth=0.8, alpha=0.45, linestyle=(0, (4, 3)))
        axes.plot(0, 0, "+", color=INK, markersize=9, markeredgewidth=1.3)
        marks = [mark for curve in curves for mark in curve.marks]
        shown = [mark.x for mark in marks if x_limit is None or mark.x <= x_limit]
        right = max([0.0, *budgets, *shown]) if x_limit is None or len(shown) == len(marks) else x_limit
        heights = [mark.y for mark in marks if mark.x <= right]
        _limits(axes.set_xlim, [0.0, right, *shown])
        _limits(axes.set_ylim, [0.0, *heights])
        axes.grid(axis="both")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _percent(axes.xaxis)
        _percent(axes.yaxis)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return draw_svg(draw, width=7.6, height=4.6)


def _limits(setter: Any, values: Sequence[float]) -> None:
    """Limits around the values with some room; never empty."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.01
    setter(low - room, high + room)


def _name_marks(axes: Axes, marks: Sequence[Mark], line_height: float = 13.0) -> None:
    """Write the names in a column at the right, in the order of the points' height and never over each other."""
    axes.figure.canvas.draw()  # fixes the limits, and with them the transformations
    to_pixels, box = axes.transData, axes.get_window_extent()
    scale = axes.figure.dpi / 72.0
    heights = [to_pixels.transform((mark.x, mark.y))[1] for mark in marks]
    next_free = box.y1 + line_height * scale
    for index in sorted(range(len(marks)), key=lambda number: -heights[number]):
        mark, colour = marks[index], COLOURS[index % len(COLOURS)]
        next_free = min(heights[index], next_free - line_height * scale)
        height = (next_free - box.y0) / box.height
        axes.annotate(
            mark.name,
            xy=(mark.x, mark.y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=9.5,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "linestyle": ":",
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def _percent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))


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
