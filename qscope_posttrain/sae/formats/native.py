"""The package's own file: one dictionary in canonical form, as safetensors.

Tensors W_enc [d_sae, d_model], b_enc [d_sae], W_dec [d_sae, d_model], b_dec [d_model], and those of the activation
("activation.threshold"). One metadata entry holds JSON: format version, activation, layer and source. The bytes are a
function of the content, so that equal dictionaries have equal files.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qscope_posttrain.atomic import replacing
from qscope_posttrain.sae.activations import Activation, activation_from_spec, activation_to_spec
from qscope_posttrain.sae.checks import check_tensor
from qscope_posttrain.sae.formats.stored import StoredSAE, check_is_file_with_data
from qscope_posttrain.sae.source import LocatedFile, SAESource

FORMAT = "native"
VERSION = 1
KEYS = ("W_enc", "b_enc", "W_dec", "b_dec")

_METADATA_KEY = "qscope_posttrain.sae"
_ACTIVATION_PREFIX = "activation."
_MAX_HEADER_BYTES = 1 << 20


def write_file(
    path: Path, tensors: dict[str, Tensor], activation: Activation, layer: int | None, source: SAESource
) -> None:
    """Write a dictionary; `path` appears whole or not at all, also when the process is killed."""
    settings, activation_tensors = activation_to_spec(activation)
    described = {"version": VERSION, "activation": settings, "layer": layer, "source": asdict(source)}
    everything = tensors | {_ACTIVATION_PREFIX + name: tensor for name, tensor in activation_tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in everything.items()},
            unfinished,
            metadata={_METADATA_KEY: json.dumps(described, sort_keys=True)},
        )


def open_file(located: LocatedFile) -> StoredSAE:
    """Open a file that `write_file` wrote, memory-mapped. ValueError that names file and fault for anything else."""
    path = located.path
    size = check_is_file_with_data(path)
    _check_header_length(path, size)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file, it may be truncated: {error}") from error
    try:
        described = _parse(metadata)
        activation = _activation(described, tensors)
        _check_tensors(tensors)
        activation.check(tensors["W_enc"].shape[0])
        layer, origin = described["layer"], SAESource.from_dict(described["source"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if layer is not None and located.layer is not None and layer != located.layer:
        raise ValueError(f"layer {located.layer} was asked for, but {path} holds layer {layer}")
    return StoredSAE(path, FORMAT, **tensors, memory_mapped=True, activation=activation, layer=layer, origin=origin)


def _check_header_length(path: Path, size: int) -> None:
    """A safetensors file begins with the length of its JSON header, as 8 bytes, little endian."""
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if size < 8 or claimed > min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(
            f"{path} is not a valid SAE file: its header claims {claimed} bytes, the file has {size} and "
            f"at most {_MAX_HEADER_BYTES} are accepted"
        )


def _parse(metadata: dict[str, str]) -> dict[str, Any]:
    if _METADATA_KEY not in metadata:
        raise ValueError(f"not an SAE of this package: its metadata has no entry {_METADATA_KEY!r}")
    try:
        described = json.loads(metadata[_METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata is not JSON: {error}") from error
    if not isinstance(described, dict) or described.get("version") != VERSION:
        version = described.get("version") if isinstance(described, dict) else None
        raise ValueError(f"format version {version!r}, but this version of the package reads {VERSION}")
    if described.keys() != {"version", "activation", "layer", "source"}:
        raise ValueError(f"its metadata has the entries {sorted(described)}")
    layer = described["layer"]
    if layer is not None and (type(layer) is not int or layer < 0):
        raise ValueError(f"its layer is {layer!r}, not an integer from 0")
    return described


def _activation(described: dict[str, Any], tensors: dict[str, Tensor]) -> Activation:
    """Take the activation's tensors out of `tensors` and build it."""
    names = [name for name in tensors if name.startswith(_ACTIVATION_PREFIX)]
    own = {name.removeprefix(_ACTIVATION_PREFIX): tensors.pop(name).clone() for name in names}
    return activation_from_spec(described["activation"], own)


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    if tensors.keys() != set(KEYS):
        raise ValueError(f"it holds the tensors {', '.join(sorted(tensors))}; expected are {', '.join(KEYS)}")
    check_tensor("b_enc", tensors["b_enc"], (None,))
    check_tensor("b_dec", tensors["b_dec"], (None,))
    d_sae, d_model = tensors["b_enc"].shape[0], tensors["b_dec"].shape[0]
    check_tensor("W_enc", tensors["W_enc"], (d_sae, d_model))
    check_tensor("W_dec", tensors["W_dec"], (d_sae, d_model))
