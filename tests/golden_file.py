"""Golden files: results of an earlier commit, in tests/golden. `QSCOPE_GOLDEN=write` writes them anew."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "golden"
MISSING = "(missing)"
ROUNDED = 0.02
"""Relative tolerance for numbers in text, which have two or three digits"""


def compare(name: str, found: Any, relative: float = 0.0, absolute: float = 0.0) -> None:
    """Fail with one line for each difference between `found` and tests/golden/<name>.json.

    With QSCOPE_GOLDEN=write the file is written instead, and the test is skipped with the differences as its reason.
    """
    path = FOLDER / f"{name}.json"
    found = json.loads(json.dumps(found))
    wanted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    lines = list(differences(wanted, found, relative, absolute))
    if os.environ.get("QSCOPE_GOLDEN") == "write":
        if lines:
            path.write_text(_readable(found), encoding="utf-8")
        pytest.skip(f"wrote {path.name}: " + ("; ".join(lines[:20]) or "no difference"))
    if lines:
        shown = "\n  ".join([*lines[:40], *([f"... and {len(lines) - 40} more"] if len(lines) > 40 else [])])
        pytest.fail(
            f"{len(lines)} differences from tests/golden/{path.name} (wanted -> found). If each is meant, renew the "
            f"file with QSCOPE_GOLDEN=write and say why in the commit:\n  {shown}",
            pytrace=False,
        )


def differences(wanted: Any, found: Any, relative: float, absolute: float, place: str = "") -> Iterator[str]:
    """One line for each difference between two JSON values; "~0.25" is a number that was rounded before."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            where = f"{place}.{key}" if place else str(key)
            yield from differences(wanted.get(key, MISSING), found.get(key, MISSING), relative, absolute, where)
    elif isinstance(wanted, list) and isinstance(found, list):
        if len(wanted) != len(found):
            yield f"{place}: {len(wanted)} entries -> {len(found)}"
        for number, (before, after) in enumerate(zip(wanted, found, strict=False)):
            yield from differences(before, after, relative, absolute, f"{place}[{number}]")
    elif _is_number(wanted) and _is_number(found):
        if not math.isclose(wanted, found, rel_tol=relative, abs_tol=absolute):
            yield f"{place}: {wanted} -> {found}"
    elif _is_rounded(wanted) and _is_rounded(found):
        if not math.isclose(float(wanted[1:]), float(found[1:]), rel_tol=ROUNDED, abs_tol=1e-3):
            yield f"{place}: {wanted[1:]} -> {found[1:]}"
    elif wanted != found or isinstance(wanted, bool) != isinstance(found, bool):
        yield f"{place}: {_short(wanted)} -> {_short(found)}"


def _readable(value: Any) -> str:
    """JSON with a line for each entry, and one for each list of plain values."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return re.sub(r"\[\n[^\[\]{}]*\]", lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rounded(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("~")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "..."
