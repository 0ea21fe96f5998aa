"""Objects of JSON Lines with their numbers; what is none is named by its line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope_posttrain.files import parse_jsonl, parse_object, read_jsonl, read_lines


def test_blank_lines_count_and_give_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2})]


@given(st.lists(st.dictionaries(st.text(), st.text())))
def test_any_text_inside_a_string_stays_in_its_line(rows):
    for ascii_only in (True, False):
        lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
        assert [row for _, row in parse_jsonl(lines.split("\n"), "here")] == rows


def test_separators_of_lines_inside_a_string_split_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"text": "one\u2028two\x85three"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert list(read_jsonl(path)) == [(1, row)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "here: not JSON"),
        ("[1]", "here: expected a JSON object, got list"),
        ("null", "here: expected a JSON object, got NoneType"),
        ('{"a":' * 100_000, "here: not JSON that can be read"),
    ],
)
def test_what_is_no_object_is_named(line, message):
    with pytest.raises(ValueError, match=message):
        parse_object(line, "here")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file at"):
        list(read_lines(tmp_path / "none"))
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(read_jsonl(tmp_path / "latin"))
