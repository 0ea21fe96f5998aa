"""Rows of runs in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.experiments.rows import read_rows, write_rows


def test_rows_come_back(tmp_path: Path) -> None:
    rows = [{"arm": "sft", "weight": 0.0, "folder": tmp_path}, {"arm": "語\u2028", "metrics": {"hz": float("nan")}}]
    place = write_rows(tmp_path, rows)
    expected = [{"arm": "sft", "weight": 0.0, "folder": str(tmp_path)}, {"arm": "語\u2028", "metrics": {"hz": None}}]
    assert read_rows(place) == read_rows(tmp_path) == expected


def test_files_that_are_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no runs at"):
        read_rows(tmp_path)
    place = tmp_path / "runs.jsonl"
    place.write_text('{"a": 1}\n{"b"', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_rows(place)
    place.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: expected a JSON object"):
        read_rows(place)
