"""Qwen-Scope: `layer{n}.sae.pt`, a pickled dict of four tensors.

    W_enc (d_sae, d_model)    W_dec (d_model, d_sae)    b_enc (d_sae,)    b_dec (d_model,)

The direction of a feature is a *column* of W_dec. Encoding is topk(x @ W_enc.T + b_enc), without subtraction of b_dec
and without input scaling, so nothing has to be folded. k is not in the file: it is part of the release's name.

The file is a pickle from the internet, so it is read with `weights_only=True`, and only after its zip directory has
been checked: a pickle of ordinary size, nothing compressed, nothing larger than the file.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from qscope_posttrain.sae.checks import check_tensor
from qscope_posttrain.sae.formats.stored import StoredSAE, check_is_file_with_data
from qscope_posttrain.sae.source import LocatedFile

FORMAT = "qwen_scope"
KEYS = ("W_enc", "W_dec", "b_enc", "b_dec")

_SAFE_TORCH = "2.10"
_MAX_PICKLE_BYTES = 1 << 20
_MAX_RECORDS = 64


def open_file(located: LocatedFile) -> StoredSAE:
    """Open one layer, memory-mapped. ValueError that names the file and the fault if it is not a Qwen-Scope SAE."""
    path = located.path
    size = check_is_file_with_data(path)
    record_sizes = _check_archive(path, size)
    tensors = _four_tensors(path, _unpickle(path), record_sizes)
    d_sae = _check_shapes(path, tensors)
    if located.release is not None and located.release.d_sae != d_sae:
        raise ValueError(
            f"{path} holds {d_sae} latents, but its release {located.release.name} has {located.release.d_sae}"
        )
    return StoredSAE(
        path=path,
        format=FORMAT,
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"].t(),
        b_dec=tensors["b_dec"],
        memory_mapped=True,
        layer=located.layer,
    )


def _check_archive(path: Path, size: int) -> set[int]:
    """Refuse, before torch sees it, whatever `torch.save` would not have written. Returns the sizes of the records."""
    records, byte_order = _read_directory(path)
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if len(pickles) != 1 or len(records) > _MAX_RECORDS:
        raise ValueError(f"{path} is not a torch.save archive of four tensors: it has {len(records)} records")
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise ValueError(f"{path} holds a pickle of {pickles[0].file_size} bytes; four tensors need a few hundred")
    if any(record.compress_type != zipfile.ZIP_STORED or record.file_size > size for record in records):
        raise ValueError(f"{path} holds compressed records or claims more data than it has; torch.save writes neither")
    if byte_order not in (b"", sys.byteorder.encode()):
        raise ValueError(f"{path} was written on a machine of the other byte order, and cannot be memory-mapped here")
    return {record.file_size for record in records}


def _read_directory(path: Path) -> tuple[list[zipfile.ZipInfo], bytes]:
    """The directory of the archive, and its record on the byte order (empty if there is none)."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            byte_order = (archive.open(record).read(8) for record in records if _is_byte_order(record))
            return records, next(byte_order, b"")
    except Exception as error:  # for damaged archives zipfile raises a dozen kinds, OSError among them
        raise ValueError(
            f"{path} is not a torch.save archive: it is truncated, in the format of torch before 1.6, "
            f"or something else ({type(error).__name__}: {error})"
        ) from error


def _is_byte_order(record: zipfile.ZipInfo) -> bool:
    return record.filename.rpartition("/")[2] == "byteorder"


def _unpickle(path: Path) -> object:
    if torch.__version__ < _SAFE_TORCH:
        raise ValueError(
            f"{path}: torch {torch.__version__} can be attacked through .pt files even with weights_only=True "
            "(CVE-2026-24747); use torch 2.10 or newer"
        )
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can fail anywhere in the unpickler
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path} was refused: it is damaged, or holds something other than tensors, which could run code when "
            f"loaded. torch.load(weights_only=True) says {type(error).__name__}: {reason[0] if reason else ''}"
        ) from error


def _four_tensors(path: Path, content: object, record_sizes: set[int]) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a Qwen-Scope SAE is a dict of {', '.join(KEYS)}")
    missing = [key for key in KEYS if key not in content]
    extra = [str(key) for key in content if key not in KEYS]
    if missing or extra:
        faults = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has extra {', '.join(extra)}"] * bool(extra)
        raise ValueError(f"{path} {' and '.join(faults)}; a Qwen-Scope SAE is a dict of exactly {', '.join(KEYS)}")
    for key in KEYS:
        tensor = content[key]
        try:
            check_tensor(key, tensor, (None, None) if key.startswith("W") else (None,))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        # A pickle may claim more than its record holds; and with strides of 0, a few bytes describe terabytes.
        held = tensor.untyped_storage().nbytes()
        if held not in record_sizes or tensor.nbytes > held:
            raise ValueError(
                f"{path}: {key} claims the shape {list(tensor.shape)}, {tensor.nbytes} bytes, "
                "which no record of the file holds"
            )
    return {key: content[key].detach() for key in KEYS}


def _check_shapes(path: Path, tensors: dict[str, Tensor]) -> int:
    """d_sae, or a ValueError that says which of the ways of being wrong this is."""
    d_sae, d_model = tensors["b_enc"].shape[0], tensors["b_dec"].shape[0]
    upright, transposed = (d_sae, d_model), (d_model, d_sae)
    W_enc, W_dec = tuple(tensors["W_enc"].shape), tuple(tensors["W_dec"].shape)
    if d_sae == d_model and W_enc == W_dec == upright:
        raise ValueError(
            f"{path}: all matrices are {d_sae} x {d_sae}, so that their orientation cannot be told from the shapes and "
            "a swapped file would pass unnoticed. No Qwen-Scope release is square; if you know the orientation, build "
            "SparseAutoencoder(...) yourself and save() it"
        )
    if (W_enc, W_dec) == (upright, transposed):
        return d_sae
    found = f"W_enc {list(W_enc)}, W_dec {list(W_dec)}, b_enc [{d_sae}], b_dec [{d_model}]"
    expected = "Qwen-Scope has W_enc [d_sae, d_model], W_dec [d_model, d_sae], b_enc [d_sae], b_dec [d_model]"
    if (W_enc, W_dec) == (transposed, upright):
        fault = "W_enc and W_dec (or b_enc and b_dec) are swapped"
    elif (W_enc, W_dec) == (upright, upright):
        fault = "W_dec is transposed"
    elif (W_enc, W_dec) == (transposed, transposed):
        fault = "W_enc is transposed"
    else:
        fault = "the shapes do not belong together"
    raise ValueError(f"{path}: {fault}: {found}. {expected}")
