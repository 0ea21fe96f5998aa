from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from benchmarks.testbed.plots import Bar, Mark, interval_bars, scatter_with_intervals
from benchmarks.testbed.report import Example
from qscope_posttrain.report.html import Figure, Section, ShadedText, ShadedTexts, write_html
from qscope_posttrain.report.plots import Curve, line_curves
from qscope_posttrain.report.tables import Table

HOSTILE = "<script>alert(1)</script>"


def _draw_all() -> list[str]:
    return [
        interval_bars([Bar("SFT", 0.3, 0.2, 0.4, (0.28, 0.33)), Bar(f"$x$ {HOSTILE}", 0.1)], "rate", True, "SFT"),
        line_curves(
            [Curve("中文", [0, 1], [3, 2], [2.9, 1.9], [3.1, 2.1]), Curve("b", [0, 1], [3, 1])], "step", "loss"
        ),
        scatter_with_intervals([Mark("a", 1, 0.2, (0.9, 1.1), (0.1, 0.3)), Mark("b", 1, 0.2)], "ppl", "rate"),
    ]


def test_plots_are_well_formed_and_deterministic():
    for svg, again in zip(_draw_all(), _draw_all(), strict=True):
        assert svg == again
        ElementTree.fromstring(svg)  # raises if it is no XML
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "<script" not in svg


def test_labels_stay_text():
    bars, curves, _ = _draw_all()
    assert "$x$ &lt;script&gt;" in bars
    assert "中文" in curves


def test_bars_are_drawn_to_scale():
    """The bar of 0.4 is twice as long as the bar of 0.2, read off the path data."""
    svg = interval_bars([Bar("a", 0.4), Bar("b", 0.2)], "x")
    paths = re.findall(r'<g id="patch_\d+">\s*<path d="([^"]+)"[^>]*fill: #3f7fd0', svg)
    lengths = []
    for path in paths:
        across = [float(x) for x, _ in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
        lengths.append(max(across) - min(across))
    assert len(lengths) == 2
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=1e-4)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        interval_bars([], "x")
    with pytest.raises(ValueError, match="no bar is called 'z'"):
        interval_bars([Bar("a", 1)], "x", reference="z")
    with pytest.raises(ValueError, match="one edge"):
        Curve("c", [1], [1], low=[1])
    with pytest.raises(ValueError, match="<svg>"):
        Figure("https://example.org/x.png")


@pytest.mark.slow
def test_matplotlib_is_imported_on_first_use_only():
    code = "import sys, qscope_posttrain.report.plots, qscope_posttrain.report.html; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


class _Page(HTMLParser):
    """Collects what a browser would fetch or run, and the text it would show."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "data") and not value.startswith("#")
        ]

    def handle_data(self, data):
        self.text += data


def _report(path) -> _Page:
    section = Section(
        f"Result {HOSTILE}",
        f"**Bold** and {HOSTILE} and `code`.",
        tables=[Table(f"T {HOSTILE}", ["m", "n"], [[HOSTILE, 0.25]])],
        figures=[Figure(svg, "caption") for svg in _draw_all()],
        shaded=[ShadedTexts("feature", [ShadedText([HOSTILE, "河", "x"], [0.0, 2.0, 1.0])])],
        examples=[Example(f"prompt {HOSTILE}", {"SFT": f"one 二三 {HOSTILE}", "SASFT": "one"}, "Han")],
        sections=[Section("Part", "below")],
    )
    written = write_html(path, "Title", [section, section, section], "sub", {"torch": "2"})
    return _Page(written.read_text(encoding="utf-8"))


def test_page_needs_nothing_from_outside_and_runs_nothing(tmp_path):
    page = _report(tmp_path / "new" / "report.html")
    assert page.outside == []
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert page.text.count(HOSTILE) >= 3 * 6


def test_page_shows_shades_marks_and_numbers(tmp_path):
    _report(tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<mark>二三</mark>" in source
    assert '<span style="--a:1.00" title="2">河</span>' in source
    assert '<span style="--a:0.50" title="1">x</span>' in source
    assert '<td class="number">0.25</td>' in source
    assert "<strong>Bold</strong>" in source
    assert "<h3>Part</h3>" in source


def test_script_runs():
    assert Example("", {}, "Han").runs("a二三b四") == [("a", False), ("二三", True), ("b", False), ("四", True)]
    assert Example("", {}, "Cyrillic").runs("кот") == [("кот", True)]
    assert Example("", {}, "Han").runs("") == []
    assert Example("", {}, "").runs("二") == [("二", False)]
    with pytest.raises(ValueError, match="no Unicode script"):
        Example("", {}, "Klingonese").runs("x")


def test_peak_is_common_to_all_passages():
    first, second = ShadedText(["a"], [1.0]), ShadedText(["b"], [4.0])
    assert ShadedTexts("t", [first, second]).shares(first) == [0.25]
    assert ShadedTexts("t", [ShadedText(["a"], [0.0])]).shares(ShadedText(["a"], [-1.0])) == [0.0]
