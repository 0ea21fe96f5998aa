"""Checks of what files and callers claim: numbers, tensors, and JSON settings, which are limited in size, without
duplicate keys, and read by type. Messages name the value and its fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.files import check_is_file, parse_object, read_text

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_ELEMENTS_PER_CHUNK = 1 << 24
FLOAT32 = torch.finfo(torch.float32)
_LARGEST_INTEGER = 2**63 - 1
MAX_SETTINGS_BYTES = 1 << 20  # No published SAE has settings above a few kilobytes

_REQUIRED: Any = object()


def as_number(name: str, value: object) -> float:
    """`value` as a float in the range of float32. ValueError for anything else, truth values and texts included."""
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, Real) or not -FLOAT32.max <= number <= FLOAT32.max:
        raise UserValueError(f"{name} must be a finite number of at most {FLOAT32.max!r}, got {shown(value)}")
    return float(number)


def as_positive(name: str, value: object) -> float:
    """`as_number` above 0 and large enough that its inverse is finite, too."""
    number = as_number(name, value)
    if number < FLOAT32.tiny:
        raise UserValueError(f"{name} must be above 0, got {shown(value)}; float32 begins at {FLOAT32.tiny!r}")
    return number


def as_integer(name: str, value: object, least: int = 1) -> int:
    """`value` if it is an integer in the range of int64. ValueError for anything else, such as 8.0, True and "8"."""
    if type(value) is not int or not least <= value <= _LARGEST_INTEGER:
        raise UserValueError(f"{name} must be an integer from {least}, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value of a file for a message, not too long."""
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return f"a {type(value).__name__}"


def check_tensor(name: str, tensor: object, shape: Sequence[int | None]) -> None:
    """Raise TypeError or ValueError unless `tensor` is a dense float tensor of `shape` (None: any length above 0)."""
    if not isinstance(tensor, Tensor):
        raise UserTypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise UserValueError(f"{name} must be a dense tensor with data, got layout {tensor.layout} on {tensor.device}")
    if tensor.dtype not in FLOAT_DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise UserValueError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; accepted are {accepted}")
    matches = tensor.ndim == len(shape) and all(
        have == want if want is not None else have > 0 for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise UserValueError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError that names the first row with a NaN or an infinity. Works in chunks, without a mask."""
    rows = tensor.detach().reshape(tensor.shape[0], -1)
    step = max(1, _ELEMENTS_PER_CHUNK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step]
        if chunk.numel() and not all(math.isfinite(bound) for bound in torch.aminmax(chunk)):
            bad = (~chunk.isfinite()).any(dim=1).nonzero()[0]
            raise UserValueError(f"{name} holds NaN or infinite values, first in row {start + int(bad)}")


@dataclass(frozen=True)
class Settings:
    """A JSON object. Getters raise ValueError that names the key for a value of the wrong kind. A key that is absent,
    or null, gives the default; without a default it is an error."""

    name: str  # Name in error messages, for example "cfg.json"
    values: dict[str, Any]

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1) -> Any:
        return self._checked(key, default, partial(as_integer, least=least))

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._checked(key, default, as_number)

    def positive(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._checked(key, default, as_positive)

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._of_type(key, default, bool, "true or false")

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._of_type(key, default, str, "a text")

    def section(self, key: str, default: Any = _REQUIRED) -> Any:
        """The object under `key`, as Settings."""
        value = self._of_type(key, default, dict, "an object")
        return value if value is default else Settings(f"{key} of {self.name}", value)

    def _checked(self, key: str, default: Any, check: Callable[[str, object], Any]) -> Any:
        value = self._get(key, default)
        return default if value is default else check(f"{key} in {self.name}", value)

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


def read_settings(path: Path) -> Settings | None:
    """The object in a JSON file; None if there is no such file. ValueError for anything that is not one."""
    if not path.exists() and not path.is_symlink():
        return None
    size = check_is_file(path).stat().st_size
    if size > MAX_SETTINGS_BYTES:
        most = f"at most {MAX_SETTINGS_BYTES}"
        raise UserValueError(f"{path} has {size} bytes; settings of an SAE have a few thousand, {most}")
    return Settings(path.name, parse_object(read_text(path), str(path), unique=True))
