from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qscope_posttrain.report.summary import to_json, writable_folder, write_summary, write_text
from qscope_posttrain.report.tables import Table


@dataclass
class Settings:
    path: Path
    names: frozenset[str]


def test_summary_holds_settings_seeds_versions_and_results(tmp_path):
    results = {
        "table": Table("t", ["a"], [[1.5]]),
        "tensor": torch.tensor([1.0, math.nan]),
        "nested": Settings(Path("x/y"), frozenset({"b", "a"})),
        "infinite": math.inf,
    }
    path = write_summary(tmp_path / "new" / "folder", "sft", {"seed": 3, "lr": 1e-4}, results)
    content = json.loads(path.read_text())
    assert path.name == "summary.json"
    assert (content["command"], content["seeds"], content["settings"]["lr"]) == ("sft", [3], 1e-4)
    assert content["results"] == {
        "table": {"title": "t", "columns": ["a"], "rows": [[1.5]], "caption": ""},
        "tensor": [1.0, None],
        "nested": {"path": "x/y", "names": ["a", "b"]},
        "infinite": None,
    }
    assert content["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("settings", "seeds"), [({}, []), ({"seeds": [1, 2]}, [1, 2]), ({"seed": None}, [])])
def test_seeds_come_from_the_settings(tmp_path, settings, seeds):
    assert json.loads(write_summary(tmp_path, "x", settings, {}).read_text())["seeds"] == seeds


def test_a_failed_write_leaves_the_old_summary(tmp_path):
    path = write_summary(tmp_path, "first", {}, {})
    with pytest.raises(TypeError, match="object"):
        write_summary(tmp_path, "second", {}, {"x": object()})
    assert json.loads(path.read_text())["command"] == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_unwritable_folder_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output folder '.*file/runs' \(Not a directory\)"):
        writable_folder(tmp_path / "file" / "runs")
    with pytest.raises(ValueError, match="cannot write"):
        write_text(tmp_path / "missing" / "x.json", "{}")


def test_unknown_values_are_refused():
    with pytest.raises(TypeError, match="cannot write a type"):
        to_json(int)
