"""A report as one HTML file that needs nothing else: no script, no font, no image from elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.report.summary import writable_folder, write_text
from qscope_posttrain.report.tables import Table

if TYPE_CHECKING:
    from jinja2 import Environment
    from rich.console import Console


@dataclass(frozen=True)
class Figure:
    """An inline `<svg>` element as `report.plots` draws it, with a caption."""

    svg: str
    caption: str = ""

    def __post_init__(self) -> None:
        if found := _not_drawing(self.svg):
            raise UserValueError(f"a figure is an <svg> element that only draws; this one has {found}.")


_DRAWING = "svg g defs path use text tspan rect circle ellipse line polyline polygon clipPath style".split()  # noqa: SIM905
_FETCHES = re.compile(r"url\((?!#)|@import|\\")  # in style; a backslash can spell either


def _not_drawing(svg: str) -> str:
    """What in an `<svg>` runs, fetches, or is read by a browser in another way than by an XML parser; "" if nothing."""
    if "<!" in svg or "<?" in svg:
        return "a comment, a declaration or an instruction"
    try:
        elements = list(ElementTree.fromstring(svg).iter())
    except ElementTree.ParseError as error:
        return f"damaged XML ({error})"
    for element in elements:
        tag = element.tag.rpartition("}")[2]
        if tag not in _DRAWING:
            return f"<{tag}>"
        if tag == "style" and _FETCHES.search(element.text or ""):
            return "a style that fetches"
        for name, value in element.attrib.items():
            name = name.rpartition("}")[2].lower()
            if name.startswith("on") or (name == "href" and not value.startswith("#")) or _FETCHES.search(value):
                return f'{name}="{value:.40}"'
    return ""


@dataclass(frozen=True)
class ShadedText:
    """A passage as tokens, each shaded by a value such as a feature's activation."""

    tokens: Sequence[str]
    values: Sequence[float]  # One per token


@dataclass(frozen=True)
class ShadedTexts:
    """Passages shaded on a common scale, from 0 to the peak, their largest value."""

    title: str
    passages: Sequence[ShadedText]

    def shares(self, passage: ShadedText) -> list[float]:
        """Each token's value as a share of the peak, within [0, 1]."""
        peak = max((max(entry.values, default=0.0) for entry in self.passages), default=0.0)
        return [min(max(value / peak, 0.0), 1.0) if peak > 0 else 0.0 for value in passage.values]


@dataclass(frozen=True)
class Section:
    """A heading with Markdown below it, then tables, figures, shaded texts and examples, in this order."""

    title: str
    body: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    shaded: Sequence[ShadedTexts] = ()
    examples: Sequence[Any] = ()  # Objects with `prompt`, `answers` by name, and `runs(answer)`: (text, marked)
    sections: Sequence[Section] = field(default=())


def write_html(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write the report and return its path; `facts` (versions, machine, settings) are the small print at its end."""
    require_extra("report")
    target = Path(path)
    writable_folder(target.parent)
    page = _environment().get_template("report.html.jinja")
    write_text(target, page.render(title=title, subtitle=subtitle, sections=sections, facts=dict(facts or {})))
    return target


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    # Raw HTML in the source is shown as text, so that a data set cannot inject markup into a report; an image, which
    # would tell its server that the report was opened, becomes a link.
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["markdown"] = lambda text: Markup(markdown.render(text))
    return environment


_DEEPEST = (214, 96, 32)  # The color of the peak; weaker values lie between it and white


def print_shaded(group: ShadedTexts, console: Console | None = None) -> None:
    """Print the title, and every passage with a background as deep as its tokens' share of the peak; without color (a
    pipe, a log, NO_COLOR), tokens with a value stand between << and >>."""
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
