"""`.npz` archives of numpy: a zip of `.npy` files, each a short header and raw numbers.

Members that are stored, as `np.savez` does, are mapped from the file; compressed ones have to be unpacked in memory,
after their header has said how large they will be. Pickled objects are never read.
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError

_MAX_MEMBERS = 64
_MAX_HEADER_BYTES = 10_000
_MAX_EXPANSION = 4
_EXPANSION_SLACK = 1 << 24
"""Trained weights hardly compress: what would grow more than fourfold (beyond a few megabytes) is no SAE."""


def read(path: Path, size: int) -> dict[str, Tensor]:
    """The tensors in a file of `size` bytes; mapped, not read, unless they are compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(path, members, size)
            return {member.filename.removesuffix(".npy"): _member(path, archive, member) for member in members}
    except Exception as error:  # for damaged archives zipfile raises a dozen kinds, OSError among them
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        reason = str(error).strip().splitlines()
        raise UserValueError(
            f"{path} is not a valid .npz archive, it may be truncated "
            f"({type(error).__name__}: {reason[0] if reason else ''})"
        ) from error


def _check_members(path: Path, members: list[zipfile.ZipInfo], size: int) -> None:
    names = [member.filename for member in members]
    if not names or len(names) > _MAX_MEMBERS or len(set(names)) < len(names):
        raise UserValueError(
            f"{path} is not a valid .npz archive of an SAE: it has {len(names)} members, or some twice"
        )
    if not all(name.endswith(".npy") for name in names):
        raise UserValueError(f"{path} is not a valid .npz archive: not all of {', '.join(names[:9])} are .npy")
    stored = sum(m.file_size for m in members if m.compress_type == zipfile.ZIP_STORED)
    unpacked = sum(m.file_size for m in members if m.compress_type != zipfile.ZIP_STORED)
    if stored > size or unpacked > _MAX_EXPANSION * size + _EXPANSION_SLACK:
        raise UserValueError(
            f"{path} has {size} bytes and claims to hold {stored} stored and {unpacked} compressed ones: "
            "weights do not compress like that"
        )


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    with archive.open(member) as stream:
        shape, fortran, dtype = _header(path, member.filename, stream)
        begin = stream.tell()
        count = math.prod(shape)
        if begin + count * dtype.itemsize != member.file_size:
            raise UserValueError(
                f"{path}: {member.filename} claims the shape {list(shape)} of {dtype.name}, which is not what its "
                f"{member.file_size} bytes hold"
            )
        order: Literal["F", "C"] = "F" if fortran else "C"
        if member.compress_type == zipfile.ZIP_STORED:
            offset = _data_offset(path, member) + begin
            if offset + count * dtype.itemsize > path.stat().st_size:
                raise UserValueError(f"{path}: {member.filename} lies beyond the end of the file")
            # Copy-on-write: torch has no read-only tensors, and nothing is ever written.
            array = np.memmap(path, dtype, mode="c", offset=offset, shape=shape, order=order) if count else np.empty(0)
        else:
            content = bytearray(stream.read(count * dtype.itemsize))
            array = np.ndarray(shape, dtype, content, order=order)
    return torch.from_numpy(array)


def _header(path: Path, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, column by column, dtype) of a .npy; ValueError for pickled objects and foreign byte order."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise UserValueError(f"{path}: {name} is a .npy of version {version}; known are 1.0 and 2.0")
    shape, fortran, dtype = readers[version](stream, max_header_size=_MAX_HEADER_BYTES)
    if dtype.hasobject:
        raise UserValueError(f"{path}: {name} holds pickled objects, which could run code when loaded; refused")
    if not dtype.isnative:
        raise UserValueError(
            f"{path}: {name} is of the other byte order ({dtype.str}), and cannot be memory-mapped here"
        )
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise UserValueError(f"{path}: {name} has the dtype {dtype}; the tensors of an SAE are numbers")
    if any(type(length) is not int or length < 0 for length in shape):
        raise UserValueError(f"{path}: {name} claims the shape {shape}")
    return shape, fortran, dtype


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Offset of a stored member in the file: after its local header, whose extra field has its own length."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise UserValueError(f"{path} is not a valid .npz archive: {member.filename} has no header where it should be")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    return member.header_offset + 30 + name_length + extra_length
