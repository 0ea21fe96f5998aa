"""What a model, a file or a server wrote, in HTML reports: it is shown as text, runs nothing and fetches nothing."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.testbed.plots import Bar, Mark, interval_bars, scatter_with_intervals
from qscope_posttrain.report.html import Figure, Section, ShadedText, ShadedTexts, write_html
from qscope_posttrain.report.plots import Curve, line_curves
from qscope_posttrain.report.tables import Table

pytestmark = pytest.mark.promise(
    "HTML reports show what came from a model or a file as text: they run nothing and fetch nothing"
)
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "![beacon](http://evil.example/i.png)",
    "![beacon][there]\n\n[there]: http://evil.example/i.png",
    "[click](javascript:alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "<http://evil.example/x.png>",
    "{{ 7 * 7 }}{% raw %}",
    "</style></title><iframe src=//evil.example>",
]


class Page(HTMLParser):
    """Tags of a page, and the attributes by which a browser runs or fetches something."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.dangerous: list[tuple[str, str | None]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            scheme = (value or "").strip().lower().partition(":")[0]
            runs = name.startswith("on") or scheme in ("javascript", "data", "vbscript")
            fetches = name in ("src", "srcset", "data", "xlink:href", "background") and not (value or "").startswith(
                "#"
            )
            if runs or fetches:
                self.dangerous.append((name, value))


@pytest.mark.parametrize("text", HOSTILE)
def test_every_place_of_a_report(tmp_path: Path, text: str) -> None:
    drawings = [interval_bars([Bar(text, 0.5)], text)]
    if text == HOSTILE[0]:
        drawings.append(line_curves([Curve(text, [0, 1], [1, 2])], text, text))
        drawings.append(scatter_with_intervals([Mark(text, 1, 2)], text, text))
    section = Section(
        text,
        text,
        tables=[Table(text, [text, "n"], [[text, 1.0]], text)],
        figures=[Figure(svg, text) for svg in drawings],
        shaded=[ShadedTexts(text, [ShadedText([text], [1.0])])],
        sections=[Section(text, f"* {text}\n\n> {text}\n\n| {text} |\n|---|\n| {text} |")],
    )
    page = Page(write_html(tmp_path / "report.html", text, [section] * 3, text, {text: text}).read_text("utf-8"))
    assert page.dangerous == []
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "image"}


DRAWING = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{}</svg>'


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ("<script>alert(1)</script>", "<script>"),
        ("<foreignObject><p/></foreignObject>", "<foreignObject>"),
        ("<image xlink:href='http://evil.example'/>", "<image>"),
        ("<a href='javascript:alert(1)'/>", "<a>"),
        ("<rect onclick='alert(1)'/>", "onclick"),
        ("<rect ONLOAD='alert(1)'/>", "onload"),
        ("<use xlink:href='http://evil.example/x.svg#a'/>", "href"),
        ("<style>@import 'http://evil.example'</style>", "style that fetches"),
        ("<style>a {{ background: u\\72l(http://evil.example) }}</style>", "style that fetches"),
        ("<rect style='fill: url(http://evil.example)'/>", "style="),
        ("<!--><img src=x onerror=alert(1)>-->", "a comment"),
        ("<style><![CDATA[</style><script>alert(1)</script>]]></style>", "a comment"),
        ("<g>", "damaged XML"),
    ],
)
def test_a_figure_only_draws(inside: str, says: str) -> None:
    with pytest.raises(ValueError, match="only draws") as error:
        Figure(DRAWING.format(inside))
    assert says in str(error.value)
    assert Figure(DRAWING.format("<defs><path id='a' d='M 0 0'/></defs><use xlink:href='#a' style='fill: url(#b)'/>"))
