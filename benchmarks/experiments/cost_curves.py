"""Plot of the gain of several methods against their cost, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.testbed.plots import Mark
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.plots import COLORS, DASHED, INK, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vP"


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


def cost_curves(
    curves: Sequence[CostCurve], x_label: str, y_label: str, budgets: Sequence[float] = (), x_limit: float | None = None
) -> str:
    """Draw gain against cost: per method a line from the reference at (0, 0), with markers and intervals at its points.

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
            color = COLORS[index % len(COLORS)]
            marker = _MARKERS[(index // len(COLORS) + index) % len(_MARKERS)]
            for mark in curve.marks:
                mark.draw_intervals(axes, color=color, linewidth=1.0, alpha=0.45)
            x, y = [0.0, *(mark.x for mark in curve.marks)], [0.0, *(mark.y for mark in curve.marks)]
            line = axes.plot(x, y, "--" if curve.dashed else "-", color=color, linewidth=1.5, label=curve.name)[0]
            line.set(marker=marker, markersize=6, markeredgewidth=1.2, markevery=slice(1, None))
            line.set_markerfacecolor("none" if curve.dashed else color)
        for budget in budgets:
            axes.axvline(budget, **DASHED)
        axes.plot(0, 0, "+", color=INK, markersize=9, markeredgewidth=1.3)
        marks = [mark for curve in curves for mark in curve.marks]
        shown = [mark.x for mark in marks if x_limit is None or mark.x <= x_limit]
        right = max([0.0, *budgets, *shown]) if x_limit is None or len(shown) == len(marks) else x_limit
        _limits(axes.set_xlim, [0.0, right, *shown])
        _limits(axes.set_ylim, [0.0, *(mark.y for mark in marks if mark.x <= right)])

    return draw_svg(draw, (7.6, 4.6), labels=(x_label, y_label), percent=(True, True), legend=True)


def _limits(setter: Any, values: Sequence[float]) -> None:
    """Limits around the values with some room; never empty."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.01
    setter(low - room, high + room)
