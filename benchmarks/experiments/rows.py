"""`runs.jsonl`: one line of JSON per run, replaced in one step, so that a reader never sees half a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserFileNotFoundError
from qscope_posttrain.files import read_jsonl
from qscope_posttrain.report.summary import to_json, write_text

FILE_NAME = "runs.jsonl"


def write_rows(folder: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write all rows into `folder` and return the file's path.

    Raises:
        ValueError: the file cannot be written.
        TypeError: a value has no JSON form.
    """
    path = Path(folder) / FILE_NAME
    write_text(path, "".join(json.dumps(to_json(row), ensure_ascii=False) + "\n" for row in rows))
    return path


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file, or of `runs.jsonl` in a folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object.
    """
    place = Path(path)
    place = place / FILE_NAME if place.is_dir() else place
    if not place.is_file():
        raise UserFileNotFoundError(f"no runs at '{place}'; `qscope experiment` writes them")
    return [row for _, row in read_jsonl(place)]
