from __future__ import annotations

import json
import math

import pytest
from rich.console import Console

from qscope_posttrain.report.tables import Table, format_cell

TABLE = Table(
    "Methods [1]", ["method", "rate", "n"], [["SFT|x", 0.123456, 4], ["SASFT [b]", math.nan, None]], caption="two seeds"
)


def test_markdown():
    assert TABLE.to_markdown() == (
        "**Methods [1]**\n\n| method | rate | n |\n| --- | ---: | ---: |\n"
        "| SFT\\|x | 0.1235 | 4 |\n| SASFT [b] | - | - |\n\ntwo seeds\n"
    )


def test_terminal_shows_brackets_and_all_cells(capsys):
    TABLE.print()
    shown = capsys.readouterr().out
    for text in ("Methods [1]", "SASFT [b]", "0.1235", "two seeds"):
        assert text in shown


def test_a_given_console_is_used():
    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115 - closed with the test
    TABLE.print(console)
    assert "0.1235" in console.export_text()


def test_json_keeps_precision_and_drops_nan():
    content = json.loads(json.dumps(TABLE.to_dict(), allow_nan=False))
    assert content["rows"] == [["SFT|x", 0.123456, 4], ["SASFT [b]", None, None]]


def test_rows_must_fit_the_columns():
    with pytest.raises(ValueError, match=r"row 1 .* has 1 cells for 2 columns"):
        Table("t", ["a", "b"], [[1, 2], [1]])


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "-"), (math.nan, "-"), (True, "yes"), (3, "3"), (1234.5678, "1235"), (1e-5, "1e-05"), ("x", "x")],
)
def test_cells(cell, text):
    assert format_cell(cell) == text


def test_a_column_of_truth_values_or_words_is_not_numeric():
    table = Table("", ["a", "b", "c", "d"], [[True, "x", 1, None], [False, 2, None, None]])
    assert [table.is_numeric(index) for index in range(4)] == [False, False, True, False]
