"""One `<svg>` element from what a function draws with matplotlib, in the page's own colours and fonts.

Drawn without pyplot: no window, no figure left open, no backend chosen for the calling program.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

from qscope_posttrain.errors import require_extra

INK = "#010203"
"""Stands for the text colour while matplotlib draws; replaced by currentColor in the SVG."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qscope_posttrain",  # the same numbers give the same file
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


def draw_svg(draw: Any, width: float, height: float) -> str:
    """Draw on fresh axes of `width` x `height` inches and return the SVG element."""
    require_extra("report")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings(), io.StringIO() as stream:
        # Text stays text: the reader's browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        figure.savefig(
            stream,
            format="svg",
            transparent=True,
            bbox_inches="tight",
            pad_inches=0.05,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
        drawn = stream.getvalue()
    element = drawn[drawn.index("<svg") :].strip()  # an XML prologue has no place inside HTML
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return element.replace(INK, "currentColor")
