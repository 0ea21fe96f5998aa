"""Shaded texts on a terminal: the same groups that `report.html` draws on a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qscope_posttrain.report.html import ShadedTexts

if TYPE_CHECKING:
    from rich.console import Console

_DEEPEST = (214, 96, 32)
"""The colour of the peak; weaker values lie between it and white."""


def print_shaded(group: ShadedTexts, console: Console | None = None) -> None:
    """Print the title, and every passage with a background as deep as its tokens' share of the peak.

    Where there is no colour (a pipe, a log, NO_COLOR), what has a value stands between << and >>.
    """
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    console = console or Console()
    plain = console.color_system is None or console.no_color
    console.print(Text(group.title, style="bold"))
    for passage in group.passages:
        line = Text("  ")
        for token, share in zip(passage.tokens, group.shares(passage), strict=True):
            if share <= 0:
                line.append(token)
            elif plain:
                line.append(f"<<{token}>>")
            else:
                red, green, blue = (round(255 - (255 - deep) * share) for deep in _DEEPEST)
                line.append(token, Style(color="#000000", bgcolor=f"#{red:02x}{green:02x}{blue:02x}"))
        console.print(line, soft_wrap=True)
