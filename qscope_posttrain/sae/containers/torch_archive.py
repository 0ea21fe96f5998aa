"""`torch.save` archives: a zip of raw storages and a pickle from the internet that says what they are.

The pickle is only read with `weights_only=True`, and only after the zip directory has been checked: a pickle of
ordinary size, nothing compressed, nothing larger than the file.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError

_SAFE_TORCH = "2.10"
_MAX_PICKLE_BYTES = 1 << 20
_MAX_RECORDS = 64


def read(path: Path, size: int) -> dict[str, object]:
    """The dict in a file of `size` bytes. Tensors are mapped, not read, and are no larger than their records."""
    record_sizes = _check_archive(path, size)
    content = _unpickle(path)
    if not isinstance(content, dict):
        raise UserValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    entries = {str(name): value for name, value in content.items()}
    for name, value in entries.items():
        inner = value.items() if isinstance(value, dict) else [(name, value)]
        for key, tensor in inner:
            if isinstance(tensor, Tensor):
                _check_storage(path, str(key), tensor, record_sizes)
    return entries


def _check_archive(path: Path, size: int) -> set[int]:
    """Refuse, before torch sees it, whatever `torch.save` would not have written. Returns the sizes of the records."""
    records, byte_order = _read_directory(path)
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if len(pickles) != 1 or len(records) > _MAX_RECORDS:
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


def _read_directory(path: Path) -> tuple[list[zipfile.ZipInfo], bytes]:
    """The directory of the archive, and its record on the byte order (empty if there is none)."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            byte_order = (archive.open(record).read(8) for record in records if _is_byte_order(record))
            return records, next(byte_order, b"")
    except Exception as error:  # for damaged archives zipfile raises a dozen kinds, OSError among them
        raise UserValueError(
            f"{path} is not a torch.save archive: it is truncated, in the format of torch before 1.6, "
            f"or something else ({type(error).__name__}: {error})"
        ) from error


def _is_byte_order(record: zipfile.ZipInfo) -> bool:
    return record.filename.rpartition("/")[2] == "byteorder"


def _unpickle(path: Path) -> object:
    if torch.__version__ < _SAFE_TORCH:
        raise UserValueError(
            f"{path}: torch {torch.__version__} can be attacked through .pt files even with weights_only=True "
            "(CVE-2026-24747); use torch 2.10 or newer"
        )
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can fail anywhere in the unpickler
        reason = str(error).strip().splitlines()
        raise UserValueError(
            f"{path} was refused: it is damaged, or holds something other than tensors, which could run code when "
            f"loaded. torch.load(weights_only=True) says {type(error).__name__}: {reason[0] if reason else ''}"
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
