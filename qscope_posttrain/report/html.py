"""A report as one HTML file that needs nothing else: no script, no font, no image from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import regex

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
        if not self.svg.startswith("<svg"):
            raise UserValueError(f"a figure is an <svg> element as a string, got '{self.svg[:40]}'.")


@dataclass(frozen=True)
class Example:
    """A prompt and its answers side by side, one a method; characters of the script `highlight` are marked.

    `highlight` is a Unicode script name such as "Han" or "Cyrillic"; empty marks nothing.
    """

    prompt: str
    answers: Mapping[str, str]
    highlight: str = ""


@dataclass(frozen=True)
class ShadedText:
    """A passage as tokens, each shaded by a value: what a feature fires on."""

    tokens: Sequence[str]
    values: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values):
            raise UserValueError(f"{len(self.tokens)} tokens but {len(self.values)} values.")


@dataclass(frozen=True)
class ShadedTexts:
    """Passages shaded on one common scale, from 0 to `peak` (by default their largest value)."""

    title: str
    passages: Sequence[ShadedText]
    peak: float | None = None

    def shares(self, passage: ShadedText) -> list[float]:
        """Each token's value as a share of the peak, within [0, 1]."""
        largest = max((max(entry.values, default=0.0) for entry in self.passages), default=0.0)
        peak = self.peak if self.peak is not None else largest
        return [min(max(value / peak, 0.0), 1.0) if peak > 0 else 0.0 for value in passage.values]


@dataclass(frozen=True)
class Section:
    """A heading with Markdown below it, then tables, figures, shaded texts and examples, in this order."""

    title: str
    body: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    shaded: Sequence[ShadedTexts] = ()
    examples: Sequence[Example] = ()
    sections: Sequence[Section] = field(default=())


def write_html(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write the report and return its path.

    Args:
        subtitle: One line below the title.
        facts: Small print at the end: versions, machine, settings.

    Raises:
        ImportError: jinja2, markdown-it-py or matplotlib is missing.
        ValueError: the file cannot be written, or an example names an unknown script.
    """
    require_extra("report")
    target = Path(path)
    writable_folder(target.parent)
    page = _environment().get_template("report.html.jinja")
    write_text(target, page.render(title=title, subtitle=subtitle, sections=sections, facts=dict(facts or {})))
    return target


def script_runs(text: str, script: str) -> list[tuple[str, bool]]:
    """Split a text into runs `(run, whether it is of the script)`; nothing is lost: the runs joined are the text.

    Raises:
        ValueError: `script` is no Unicode script name.
    """
    if not script:
        return [(text, False)]
    try:
        pattern = regex.compile(rf"\p{{Script={script}}}+")
    except regex.error as error:
        raise UserValueError(f"'{script}' is no Unicode script name; examples are Han, Hangul, Cyrillic.") from error
    runs: list[tuple[str, bool]] = []
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            runs.append((text[end : match.start()], False))
        runs.append((match.group(), True))
        end = match.end()
    if end < len(text):
        runs.append((text[end:], False))
    return runs


def _markdown(text: str) -> str:
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    # Raw HTML in the source is shown as text, so that a data set cannot inject markup into a report.
    return Markup(MarkdownIt("commonmark", {"html": False}).enable("table").render(text))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = _markdown
    environment.filters["script_runs"] = script_runs
    return environment


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
