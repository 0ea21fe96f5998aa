"""Open files of tensors: safetensors, `torch.save` archives and numpy's `.npz`. Nothing in them is trusted.

Every claim of a file is checked before anything is allocated. Tensors are mapped instead of read, except the compressed
members of a `.npz`, which are unpacked after their header has said how large they will be. A pickle is only read with
`weights_only=True`, from an archive in which nothing is compressed or larger than the file.
"""

from __future__ import annotations

import math
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import parse_object

_MAX_HEADER_BYTES = 1 << 20
_MAX_PICKLE_BYTES = 1 << 20
_MAX_NPY_HEADER_BYTES = 10_000
_MAX_TENSORS = 256
_MAX_MEMBERS = 64
_MAX_EXPANSION = 4
_EXPANSION_SLACK = 1 << 24  # Weights hardly compress: what would grow fourfold beyond this is no SAE
_SAFE_TORCH = "2.10"


def read_safetensors(path: Path, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file of `size` bytes."""
    _check_safetensors_header(path, size)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, file.metadata() or {}
    except Exception as error:  # SafetensorError, but also what torch and the binding raise for absurd shapes
        kind = "" if isinstance(error, SafetensorError) else f"{type(error).__name__}: "
        reason = f"{kind}{_first_line(error)}"
        raise UserValueError(f"{path} is not a valid safetensors file, it may be truncated: {reason}") from error


def _check_safetensors_header(path: Path, size: int) -> None:
    """Refuse what the library accepts: a header too long for four tensors, thousands of tensors, a repeated name."""
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
        if size < 8 or claimed > min(size - 8, _MAX_HEADER_BYTES):
            raise UserValueError(
                f"{path} is not a valid SAE file: its header claims {claimed} bytes, the file has {size} and "
                f"at most {_MAX_HEADER_BYTES} are accepted"
            )
        text = file.read(claimed).decode("utf-8", "replace")  # the library refuses anything but UTF-8
        header = parse_object(text, f"{path} is not a valid safetensors file: its header", unique=True)
    if len(header) > _MAX_TENSORS:
        raise UserValueError(
            f"{path} is not a valid SAE file: it has {len(header)} tensors, at most {_MAX_TENSORS} are"
        )


def read_torch(path: Path, size: int) -> Mapping[str, object]:
    """The dict in a file of `size` bytes; no tensor in it is larger than its record."""
    record_sizes = _check_torch_archive(path, size)
    content = _unpickled(path)
    if not isinstance(content, dict):
        raise UserValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    entries = {str(name): value for name, value in content.items()}
    for name, value in entries.items():
        inner = value if isinstance(value, dict) else {name: value}
        for key, tensor in inner.items():
            if isinstance(tensor, Tensor):
                _check_storage(path, str(key), tensor, record_sizes)
    return entries


def _check_torch_archive(path: Path, size: int) -> set[int]:
    """Refuse, before torch sees it, whatever `torch.save` would not have written. Returns the sizes of the records."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            named = [record for record in records if record.filename.rpartition("/")[2] == "byteorder"]
            byte_order = archive.open(named[0]).read(8) if named else b""
    except Exception as error:  # for damaged archives zipfile raises a dozen kinds, OSError among them
        raise UserValueError(
            f"{path} is not a torch.save archive: it is truncated, in the format of torch before 1.6, "
            f"or something else ({type(error).__name__}: {error})"
        ) from error
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if len(pickles) != 1 or len(records) > _MAX_MEMBERS:
        raise UserValueError(f"{path} is not a torch.save archive of a few tensors: it has {len(records)} records")
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise UserValueError(f"{path} holds a pickle of {pickles[0].file_size} bytes; a few tensors need a few hundred")
    if any(record.compress_type != zipfile.ZIP_STORED or record.file_size > size for record in records):
        raise UserValueError(
            f"{path} holds compressed records or claims more data than it has; torch.save writes neither"
        )
    if byte_order not in (b"", sys.byteorder.encode()):
        raise UserValueError(
            f"{path} was written on a machine of the other byte order, and cannot be memory-mapped here"
        )
    return {record.file_size for record in records}


def _unpickled(path: Path) -> object:
    if torch.__version__ < _SAFE_TORCH:
        raise UserValueError(
            f"{path}: torch {torch.__version__} can be attacked through .pt files even with weights_only=True "
            "(CVE-2026-24747); use torch 2.10 or newer"
        )
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can fail anywhere in the unpickler
        raise UserValueError(
            f"{path} was refused: it is damaged, or holds something other than tensors, which could run code when "
            f"loaded. torch.load(weights_only=True) says {type(error).__name__}: {_first_line(error)}"
        ) from error


def _check_storage(path: Path, name: str, tensor: Tensor, record_sizes: set[int]) -> None:
    """A pickle may claim more than its record holds; and with strides of 0, a few bytes describe terabytes."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise UserValueError(
            f"{path}: {name} must be a dense tensor with data, got layout {tensor.layout} on {tensor.device}"
        )
    held = tensor.untyped_storage().nbytes()
    if held not in record_sizes or tensor.nbytes > held:
        raise UserValueError(
            f"{path}: {name} claims the shape {list(tensor.shape)}, {tensor.nbytes} bytes, "
            "which no record of the file holds"
        )


def read_npz(path: Path, size: int) -> dict[str, Tensor]:
    """The tensors in a file of `size` bytes. Pickled objects are never read."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_npz_members(path, members, size)
            return {member.filename.removesuffix(".npy"): _npz_member(path, archive, member) for member in members}
    except Exception as error:  # for damaged archives zipfile raises a dozen kinds, OSError among them
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UserValueError(f"{path} is not a valid .npz archive, it may be truncated ({reason})") from error


def _check_npz_members(path: Path, members: list[zipfile.ZipInfo], size: int) -> None:
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


def _npz_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    with archive.open(member) as stream:
        shape, fortran, dtype = _npy_header(path, member.filename, stream)
        begin, wanted = stream.tell(), math.prod(shape) * dtype.itemsize
        if begin + wanted != member.file_size:
            raise UserValueError(
                f"{path}: {member.filename} claims the shape {list(shape)} of {dtype.name}, which is not what its "
                f"{member.file_size} bytes hold"
            )
        order: Literal["F", "C"] = "F" if fortran else "C"
        if member.compress_type != zipfile.ZIP_STORED:
            return torch.from_numpy(np.ndarray(shape, dtype, bytearray(stream.read(wanted)), order=order))
    offset = _data_offset(path, member) + begin
    if offset + wanted > path.stat().st_size:
        raise UserValueError(f"{path}: {member.filename} lies beyond the end of the file")
    # Copy-on-write: torch has no read-only tensors, and nothing is ever written.
    array = np.memmap(path, dtype, mode="c", offset=offset, shape=shape, order=order) if wanted else np.empty(0)
    return torch.from_numpy(array)


def _npy_header(path: Path, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, column by column, dtype) of a .npy; ValueError for pickled objects and foreign byte order."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise UserValueError(f"{path}: {name} is a .npy of version {version}; known are 1.0 and 2.0")
    shape, fortran, dtype = readers[version](stream, max_header_size=_MAX_NPY_HEADER_BYTES)
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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
