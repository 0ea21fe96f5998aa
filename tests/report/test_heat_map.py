from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from qscope_posttrain.report.plots import heat_map


def test_a_cell_for_every_value_deeper_where_it_is_larger():
    svg = heat_map([[1.0, 0.5], [math.nan, 0.0]], ["a", "b"], ["c", "$d$"])
    ElementTree.fromstring(svg)
    depths = [float(found) for found in re.findall(r"fill: #3f7fd0; opacity: ([\d.]+)", svg)]
    assert depths == pytest.approx([0.85, 0.425])  # nothing is painted for 0
    assert all(text in svg for text in ("1.00", "0.50", "0.00", "$d$"))
    assert "nan" not in svg
    assert svg == heat_map([[1.0, 0.5], [math.nan, 0.0]], ["a", "b"], ["c", "$d$"])


def test_peak_and_large_matrices():
    half = heat_map([[0.5]], ["a"], ["b"], peak=1.0)
    assert float(re.findall(r"opacity: ([\d.]+)", half)[0]) == pytest.approx(0.425)
    names = [f"n{number}" for number in range(25)]
    assert ">0.30<" not in heat_map([[0.3] * 25] * 25, names, names)


@pytest.mark.parametrize(("values", "rows"), [([], []), ([[1.0]], ["a", "b"]), ([[1.0, 2.0]], ["a"])])
def test_bad_input_is_refused(values, rows):
    with pytest.raises(ValueError, match="at least one"):
        heat_map(values, rows, ["c"])
