"""Plots as inline SVG: curves with bands, heat maps.

Every function takes numbers and returns one `<svg>` element as a string, for `report.html.Figure`. Axes and text are
drawn in `currentColor` and text stays text, so that a figure follows the reader's light or dark theme and fonts.
matplotlib is imported on first use, and without pyplot: no window, no open figure, no backend for the whole program.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserValueError, require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#3f7fd0", "#df7f3b", "#2f9e77", "#b062b3", "#c59f1d", "#d3545f", "#56a5c4", "#8c8c8c")
"""Middle tones that hold on white and on near-black paper."""
INK = "#010203"
"""Stands for the text color while matplotlib draws; replaced by currentColor in the SVG."""
DASHED: Any = {"color": INK, "linewidth": 0.8, "alpha": 0.45, "linestyle": (0, (4, 3))}
"""Line of a reference or a budget"""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qscope_posttrain",  # the same numbers give the same file
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "font.family": "sans-serif",
    "font.size": 10.5,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width", "grid.linewidth"), 0.7),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.13,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}
_NUMBERS_UP_TO = 20  # Rows of a heat map whose cells have room for their numbers


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


def draw_svg(
    draw: Callable[[Axes], None],
    size: tuple[float, float],
    *,
    labels: tuple[str, str] = ("", ""),
    percent: tuple[bool, bool] = (False, False),
    legend: bool = False,
) -> str:
    """Draw on fresh axes of `size` (width and height in inches) and return the SVG element. `labels` and `percent`
    (values are shares in [0, 1], shown as per cent) are of the horizontal and the vertical axis. Labeled axes have grid
    lines; a `legend` stands at the right."""
    require_extra("report")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings(), io.StringIO() as stream:
        # Text stays text: the reader's browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        for axis, label, shares in zip((axes.xaxis, axes.yaxis), labels, percent, strict=True):
            if label:
                axis.set_label_text(label)
                axis.grid(True)
            if shares:
                axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        if legend:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.05, metadata=metadata)
        drawn = stream.getvalue()
    element = drawn[drawn.index("<svg") :].strip()  # an XML prologue has no place inside HTML
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return element.replace(INK, "currentColor")


def line_curves(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    percent: bool = False,
    x_marks: Sequence[float] | None = None,
) -> str:
    """Draw curves with optional bands on common axes, with a legend at the right. `log_y` is for losses and
    perplexities that fall over decades; with `percent`, values are shares in [0, 1], shown as per cent; `x_marks`,
    positions above 0, are marked on a logarithmic horizontal axis, which without them is linear."""
    if not curves:
        raise UserValueError("line_curves needs at least one curve.")
    from matplotlib.ticker import MaxNLocator, NullLocator

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            color = COLORS[index % len(COLORS)]
            dashes = "-" if index < len(COLORS) else "--"
            axes.plot(curve.x, curve.y, dashes, color=color, linewidth=1.7, label=curve.name)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.16, linewidth=0)
        if log_y:
            axes.set_yscale("log")
        if x_marks is not None:
            axes.set_xscale("log")
            axes.set_xticks(x_marks, [f"{mark:g}" for mark in x_marks])
            axes.xaxis.set_minor_locator(NullLocator())
        elif all(float(x).is_integer() for curve in curves for x in curve.x):
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))  # no step 1.5
        axes.margins(x=0.01)

    several = len(curves) > 1
    return draw_svg(draw, (7.6, 3.5), labels=(x_label, y_label), percent=(False, percent), legend=several)


def heat_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], peak: float | None = None
) -> str:
    """Draw a cell for each of the `values` `[rows, columns]`, 0 or more (NaN leaves it empty), the deeper the color the
    larger, the first row on top; `peak` is the value of full color, by default the largest one."""
    if not rows or len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise UserValueError(f"expected {len(rows)} rows of {len(columns)} values, at least one.")
    known = [value for row in values for value in row if math.isfinite(value)]
    full = max(known, default=1.0) if peak is None else peak

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        cells = [(row, column, value) for row, line in enumerate(values) for column, value in enumerate(line)]
        for row, column, value in cells:
            if math.isfinite(value):
                share = min(max(value / full, 0.0), 1.0) if full > 0 else 0.0
                axes.add_patch(Rectangle((column, row), 1, 1, facecolor=COLORS[0], alpha=0.85 * share, linewidth=0))
                if len(rows) <= _NUMBERS_UP_TO:
                    axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8.5)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks([column + 0.5 for column in range(len(columns))], columns, rotation=40, ha="right")
        axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set(visible=True, color=INK, alpha=0.25)

    return draw_svg(draw, (1.8 + 0.56 * len(columns), 1.3 + 0.42 * len(rows)))
