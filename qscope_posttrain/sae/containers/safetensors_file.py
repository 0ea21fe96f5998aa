"""safetensors: the length of a JSON header in 8 bytes, the header, then the tensors."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.containers import json_file

_MAX_HEADER_BYTES = 1 << 20
_MAX_TENSORS = 256


def read(path: Path, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file of `size` bytes; the tensors are mapped, not read."""
    _check_header(path, size)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, file.metadata() or {}
    except Exception as error:  # SafetensorError, but also what torch and the binding raise for absurd shapes
        reason = str(error).strip().splitlines()
        kind = "" if isinstance(error, SafetensorError) else f"{type(error).__name__}: "
        raise UserValueError(
            f"{path} is not a valid safetensors file, it may be truncated: {kind}{reason[0] if reason else ''}"
        ) from error


def _check_header(path: Path, size: int) -> None:
    """Refuse what the library accepts: a header too long for four tensors, thousands of tensors, a repeated name."""
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
        if size < 8 or claimed > min(size - 8, _MAX_HEADER_BYTES):
            raise UserValueError(
                f"{path} is not a valid SAE file: its header claims {claimed} bytes, the file has {size} and "
                f"at most {_MAX_HEADER_BYTES} are accepted"
            )
        header = json_file.parse(file.read(claimed), f"{path} is not a valid safetensors file: its header")
    if len(header) > _MAX_TENSORS:
        raise UserValueError(
            f"{path} is not a valid SAE file: it has {len(header)} tensors, at most {_MAX_TENSORS} are"
        )
