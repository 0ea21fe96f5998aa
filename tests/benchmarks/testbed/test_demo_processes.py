"""Both tasks of the demo side by side: whose lines are whose, what is put together, and how a mistake ends both."""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
from pathlib import Path

import pytest

from benchmarks.testbed import demo
from benchmarks.testbed.demo import LabeledLines, run_demo
from benchmarks.testbed.processes import run_in_parallel
from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.report import DemoPart
from benchmarks.testbed.switching.config import SwitchingConfig
from qscope_posttrain.report.progress import progress
from qscope_posttrain.report.tables import Table


def test_every_line_says_which_task_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    lines = LabeledLines(written, "switching")
    print("one", "line", file=lines)
    lines.write("half of ")
    assert written.getvalue() == "switching: one line\n"
    lines.write("another\nand a third\n")
    monkeypatch.setattr(sys, "stderr", lines)
    assert list(progress([1], description="working", enabled=True)) == [1]  # no bar, which would hide the other task's
    said = written.getvalue().splitlines()
    assert said[1:4] == ["switching: half of another", "switching: and a third", "switching: working: 0/1 (0 %)"]


def test_results_come_from_this_process_or_from_several() -> None:
    assert list(run_in_parallel(abs, [-1, 2], 1)) == [1, 2]
    assert list(run_in_parallel(abs, [], 2)) == []


def test_parts_are_put_together_in_one_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    def part(task: tuple[SwitchingConfig | RepetitionConfig, Path, bool]) -> DemoPart:
        config, _, apart = task
        name = "switching" if isinstance(config, SwitchingConfig) else "repetition"
        assert (config.workers, apart) == (1, False)
        table = Table(name, ["a column of some width"], [[1]])
        line = [name, "method", "1 %", None, "(compared with this)", "fine"]
        return DemoPart(name, [line], "", [], {name: table}, {f"{name}_result": 1}, {}, (0,))

    monkeypatch.setattr(demo, "_run_part", part)
    run_demo(SwitchingConfig(workers=1), tmp_path, RepetitionConfig(workers=1))
    shown = capsys.readouterr().out
    assert shown.index("switching") < shown.index("repetition") < shown.index("In short")
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["results"]["tables"]) == ["headline", "switching", "repetition"]
    assert summary["results"]["switching_result"] == summary["results"]["repetition_result"] == 1
    assert "threads" in summary["machine"]


@pytest.mark.slow  # two processes import torch and trl
def test_a_mistake_in_one_task_ends_the_other(tmp_path: Path) -> None:
    missing = SwitchingConfig(corpus=str(tmp_path / "none"), workers=2, cache=str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run_demo(missing, tmp_path / "out", RepetitionConfig(workers=2, cache=str(tmp_path / "cache")))
    assert not multiprocessing.active_children()
