"""`summary.json`: the settings and results of a command, for scripts to read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.files import replacing
from qscope_posttrain.provenance import machine, package_versions
from qscope_posttrain.report.tables import Table

FILE_NAME = "summary.json"


def write_summary(
    folder: str | os.PathLike[str],
    command: str,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    seeds: Sequence[int] | None = None,
) -> Path:
    """Write `summary.json` into `folder`, which is made if missing, in one step, and return its path. `command` is for
    example "features find"; the seeds are by default those in `settings` as `seed` or `seeds`."""
    if seeds is None:
        found = settings.get("seeds", settings.get("seed"))
        seeds = [] if found is None else [found] if isinstance(found, int) else list(found)
    content = {
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": to_json(settings),
        "seeds": list(seeds),
        "results": to_json(results),
        "versions": package_versions(),
        "machine": machine(),
    }
    path = writable_folder(folder) / FILE_NAME
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder with its parents and check that a file can be written there; ValueError, with the reason. Call it
    before the work starts, so that hours of it are not lost to a mistyped path."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UserValueError(
            f"cannot write to the output folder {str(folder)!r} ({reason}); choose another folder."
        ) from error
    return folder


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file in one step: a reader sees the old content or the new. ValueError, with the reason."""
    target = Path(path)
    try:
        with replacing(target) as unfinished:
            unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserValueError(str(error)) from error


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write every row as one line of JSON, in one step, and return the path. ValueError if it cannot be written."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return Path(path)


def to_json(value: Any) -> Any:
    """Convert tables, dataclasses, paths, tensors and arrays for `json.dumps`; NaN and infinities become null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Table):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((to_json(entry) for entry in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [to_json(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # tensors and numpy arrays and scalars
        return to_json(value.tolist())
    raise UserTypeError(f"cannot write a {type(value).__name__} to JSON: {value!r}.")
