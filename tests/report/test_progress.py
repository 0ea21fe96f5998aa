from __future__ import annotations

import pytest

from qscope_posttrain.report import progress as module
from qscope_posttrain.report.progress import progress, status


def test_silent_where_the_environment_asks_for_it_unless_enabled(capsys, monkeypatch):
    assert list(progress(range(3))) == [0, 1, 2]
    status("unseen")
    assert capsys.readouterr().err == ""
    status("seen", enabled=True)
    assert capsys.readouterr().err == "seen\n"
    monkeypatch.delenv("QSCOPE_QUIET")
    status("seen by default")
    assert capsys.readouterr().err == "seen by default\n"


def test_lines_say_first_and_last(capsys):
    assert list(progress(range(4), description="count", enabled=True, note=lambda: "loss 2.0")) == [0, 1, 2, 3]
    first, last = capsys.readouterr().err.splitlines()
    assert first == "count: 0/4 (0 %)"
    assert last.startswith("count: 4/4 (100 %) in 0:00")
    assert last.endswith("loss 2.0")


def test_lines_between_come_at_intervals_with_rate_and_remaining_time(capsys, monkeypatch):
    now = iter(range(0, 1000, 2))  # every look at the clock is two seconds later
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    list(progress(range(10), description="slow", enabled=True))
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "slow: 3/10 (30 %), 2 s each, 0:14 left"
    assert len(lines) == 2 + 3  # six seconds apart: after 3, 6 and 9
    assert lines[-1] == "slow: 10/10 (100 %) in 0:22, 2.2 s each"


def test_total_may_be_unknown_or_given(capsys):
    list(progress(iter(range(2)), enabled=True))
    list(progress(iter(range(2)), total=2, enabled=True))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "working: 0"
    assert lines[2] == "working: 0/2 (0 %)"


def test_a_loop_that_is_left_says_where(capsys):
    with pytest.raises(RuntimeError, match="stop"):
        list(progress(_failing(), total=5, description="x", enabled=True))
    assert capsys.readouterr().err.splitlines()[-1] == "x: stopped after 1/5 (20 %)"


def test_only_the_first_rank_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert list(progress(range(2), enabled=True)) == [0, 1]
    status("unseen", enabled=True)
    assert capsys.readouterr().err == ""


def test_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress(range(3), description="with [brackets]", enabled=True)) == [0, 1, 2]
    assert "with [brackets]" in capsys.readouterr().err


def test_bars_nest(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    pairs = [(a, b) for a in progress(range(2), enabled=True) for b in progress(range(2), enabled=True)]
    assert pairs == [(0, 0), (0, 1), (1, 0), (1, 1)]


def _failing():
    yield 0
    raise RuntimeError("stop")
