"""JSON Lines: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError


def read_lines(path: str | Path) -> Iterator[str]:
    r"""The lines of a UTF-8 file as a stream, split at `\n` alone: JSON allows U+2028, at which `str.splitlines` also
    splits, inside a string.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8.
    """
    location = Path(path)
    if not location.is_file():
        raise UserFileNotFoundError(f"no file at '{location}'.")
    with location.open(encoding="utf-8", newline="\n") as stream:
        try:
            yield from stream
        except UnicodeDecodeError as error:
            raise UserValueError(f"'{location}' is not UTF-8 text ({error.reason}).") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of every line that is not blank.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object, with its number.
    """
    return parse_jsonl(read_lines(path), path)


def parse_jsonl(lines: Iterable[str], path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, of lines that are read already; `path` is what an error calls them."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, parse_object(line, f"{path}, line {number}")


def parse_object(line: str, place: str) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        ValueError: anything else, or nested too deeply, with its place.
    """
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserValueError(f"{place}: not JSON ({error.msg}).") from error
    except RecursionError:
        raise UserValueError(f"{place}: not JSON that can be read (nested too deeply).") from None
    if not isinstance(found, dict):
        raise UserValueError(f"{place}: expected a JSON object, got {type(found).__name__}.")
    return found
