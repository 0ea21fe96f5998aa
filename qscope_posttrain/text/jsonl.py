"""Read JSON and JSON Lines (one object per line)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import read_lines

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_jsonl(path: str | os.PathLike[str], packed: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number (from 1) and the object of every line that is not blank; ValueError for anything else."""
    return parse_jsonl(read_lines(path, packed=packed), path)


def parse_jsonl(lines: Iterable[str], path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Do the same for lines that are read already; `path` stands for them in errors."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, parse_object(line, f"{path}, line {number}")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read the JSON value that a file holds. FileNotFoundError, or ValueError with the line."""
    return _parse("".join(read_lines(path)), str(path), by_line=True)


def parse_object(line: str, place: str) -> dict[str, Any]:
    """The JSON object that a line holds; ValueError, with its place, for anything else, nested too deeply, or with half
    of a surrogate pair in a string."""
    found = _parse(line, place)
    if not isinstance(found, dict):
        raise UserValueError(f"{place}: expected a JSON object, got {type(found).__name__}.")
    return found


def _parse(text: str, place: str, by_line: bool = False) -> Any:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{place}, line {error.lineno}" if by_line else place
        raise UserValueError(f"{where}: not JSON ({error.msg}).") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserValueError(f"{place}: not JSON that can be read ({reason}).") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(error.object[error.start]):04X}"
            raise UserValueError(f"{place}: half of a surrogate pair ({half}): the text is damaged.") from None
    return found
