"""JSON settings beside the weights: limited in size, without duplicate keys, read by type."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import check_is_file, read_text
from qscope_posttrain.sae.checks import as_integer, as_number, as_positive, shown

MAX_BYTES = 1 << 20
"""No published SAE has settings above a few kilobytes."""

_REQUIRED: Any = object()


@dataclass(frozen=True)
class Settings:
    """A JSON object. Getters raise ValueError that names the key for a value of the wrong kind.

    A key that is absent, or null, gives the default; without a default it is an error.
    """

    name: str
    """Name in error messages, for example "cfg.json"."""
    values: dict[str, Any]

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1) -> Any:
        value = self._get(key, default)
        return default if value is default else as_integer(f"{key} in {self.name}", value, least)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default)
        return default if value is default else as_number(f"{key} in {self.name}", value)

    def positive(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default)
        return default if value is default else as_positive(f"{key} in {self.name}", value)

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._of_type(key, default, bool, "true or false")

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._of_type(key, default, str, "a text")

    def section(self, key: str, default: Any = _REQUIRED) -> Any:
        """The object under `key`, as Settings."""
        value = self._of_type(key, default, dict, "an object")
        return value if value is default else Settings(f"{key} of {self.name}", value)

    def _of_type(self, key: str, default: Any, kind: type, words: str) -> Any:
        value = self._get(key, default)
        if value is not default and type(value) is not kind:
            raise UserValueError(f"{key} in {self.name} must be {words}, got {shown(value)}")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is _REQUIRED:
            raise UserValueError(f"{self.name} lacks {key}")
        return default if value is None else value


def read(path: Path) -> Settings | None:
    """The object in a JSON file; None if there is no such file. ValueError for anything that is not one."""
    if not path.exists() and not path.is_symlink():
        return None
    size = check_is_file(path).stat().st_size
    if size > MAX_BYTES:
        raise UserValueError(f"{path} has {size} bytes; settings of an SAE have a few thousand, at most {MAX_BYTES}")
    return Settings(path.name, parse(read_text(path), str(path)))


def parse(content: bytes | str, what: str) -> dict[str, Any]:
    """The JSON object in `content`. ValueError that begins with `what` for anything else."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserValueError(f"{what} is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise UserValueError(f"{what} must be a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserValueError(f"the key {next(n for n in names if names.count(n) > 1)[:100]!r} occurs twice")
    return values
