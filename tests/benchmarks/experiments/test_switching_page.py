"""The report of a switching experiment and its curve plot."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from synthetic_rows import switching_row

from benchmarks.experiments.cost_curves import CostCurve, cost_curves
from benchmarks.experiments.switching_page import switching_report
from benchmarks.testbed.plots import Mark
from qscope_posttrain.report.html import write_html

WORLD = {
    "cell": "zh",
    "loss": 2.5,
    "explained_variance": {"2": 0.9, "3": 0.85},
    "target_tokens": 130,
    "causal_check": {"title": "Causal check", "columns": ["row", "change"], "rows": [["zh #1", -1.0]], "caption": ""},
    "identification": None,
}


def rows_of(cell: str, **others) -> list[dict]:
    rows = []
    for base in (0, 1, 2):
        place = {"cell": cell, "base": base, **others}
        rows += [
            switching_row(**place),
            switching_row("token_penalty", 10.0, 0.5, 0.7, target=70, **place),
            switching_row("token_penalty", 20.0, 1.5 + 0.1 * base, 0.5, target=50, **place),
            switching_row("sasft_combined", 0.1, 0.7, 0.8, target=80, **place),
            switching_row("sasft_combined", 0.9, 9.0, 0.2, target=20, **place),
        ]
    return rows


def test_report_has_verdicts_cells_and_models(tmp_path):
    rows = [*rows_of("zh"), *rows_of("ko"), {"kind": "repetition"}]
    worlds = [{**WORLD, "base": base} for base in (0, 0, 1)]
    sections, tables = switching_report(rows, worlds, {"zh": "Chinese"})
    assert [section.title for section in sections] == ["What was found", "Chinese", "ko", "The models"]
    assert list(tables)[:2] == ["verdicts", "zh/chosen"]
    assert not any(name.endswith("runs") for name in tables)
    assert [row[0] for row in tables["verdicts"].rows] == ["Chinese", "ko"]
    assert len(sections[1].figures) == 2
    assert "1 coefficient lies to the right" in sections[1].figures[0].caption
    assert len(sections[-1].sections[0].tables) == 2  # the same check of the same base is shown once
    page = write_html(tmp_path / "report.html", "Title", sections).read_text(encoding="utf-8")
    assert "every run" in page
    assert "Causal check" in page


def test_report_without_samples_has_one_plot():
    rows = [{**row, "sampled": None} for row in rows_of("zh")]
    sections, _ = switching_report(rows)
    assert len(sections[1].figures) == 1
    assert sections[-1].title == "zh"


def test_false_alarms_of_words_are_shown():
    rate = {"estimate": 0.005, "low": 0.002, "high": 0.01}
    identification = {"calibration": {"en": {"texts": 1000, "false_positives": 5, "rate": rate}}}
    world = {**WORLD, "cell": "fr", "base": 0, "causal_check": None, "identification": identification}
    rows = rows_of("fr", identify="words")
    (alarms,) = switching_report(rows, [world])[0][-1].sections
    assert alarms.tables[0].rows == (("fr", 0, "en", 1000, 5, 0.5, "0.20 .. 1.00"),)


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        switching_report([{"kind": "repetition"}])


def test_cost_curves_draw_every_arm_and_the_budget():
    curves = [
        CostCurve("SAE 中", [Mark("a", 0.002, -0.2, (0.001, 0.003), (-0.3, -0.1)), Mark("b", 0.5, -0.9)]),
        CostCurve("control", [Mark("c", -0.001, -0.1)], dashed=True),
    ]
    svg = cost_curves(curves, "cost", "switching", [0.01], x_limit=0.04)
    ElementTree.fromstring(svg)
    assert svg == cost_curves(curves, "cost", "switching", [0.01], x_limit=0.04)
    assert "SAE 中" in svg
    assert "control" in svg
    # The axis ends at the limit: no label of 10 % or more on it.
    assert not re.search(r">\d\d %<", svg)
    with pytest.raises(ValueError, match="at least one curve"):
        cost_curves([], "cost", "switching")
    with pytest.raises(ValueError, match="no points"):
        CostCurve("empty", [])
