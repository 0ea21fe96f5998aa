"""The package's own file: one dictionary in canonical form, as safetensors.

Tensors W_enc [d_sae, d_model], b_enc [d_sae], W_dec [d_sae, d_model], b_dec [d_model], and those of the activation
("activation.threshold"). One metadata entry holds JSON: format version, activation, layer and source. The bytes are a
function of the content, so that equal dictionaries have equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import replacing
from qscope_posttrain.sae.activations import Activation, activation_from_spec, activation_to_spec
from qscope_posttrain.sae.checks import as_integer, shown
from qscope_posttrain.sae.containers import json_file
from qscope_posttrain.sae.containers.weights_file import WeightsFile
from qscope_posttrain.sae.formats.stored import StoredSAE
from qscope_posttrain.sae.source import LocatedFile, SAESource

FORMAT = "native"
VERSION = 1
KEYS = ("W_enc", "b_enc", "W_dec", "b_dec")

METADATA_KEY = "qscope_posttrain.sae"
_ACTIVATION_PREFIX = "activation."


def write_file(
    path: Path, tensors: dict[str, Tensor], activation: Activation, layer: int | None, source: SAESource
) -> None:
    """Write a dictionary; `path` appears whole or not at all, also when the process is killed."""
    settings, activation_tensors = activation_to_spec(activation)
    described = {"version": VERSION, "activation": settings, "layer": layer, "source": asdict(source)}
    everything = tensors | {_ACTIVATION_PREFIX + name: tensor for name, tensor in activation_tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        save_file(unshared(everything), unfinished, metadata={METADATA_KEY: json.dumps(described, sort_keys=True)})


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, and no two of one memory, as those of a tied
    dictionary are."""
    plain: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if place in memory else tensor
        memory.add(place)
    return plain


def recognises(weights: WeightsFile) -> bool:
    return weights.kind == "safetensors" and METADATA_KEY in weights.metadata


def open_file(weights: WeightsFile, located: LocatedFile, input_scale: float | None) -> StoredSAE:
    """Open a file that `write_file` wrote. ValueError that names the fault for anything else."""
    described = _parse(weights.metadata)
    activation_names = {name for name in weights.names if name.startswith(_ACTIVATION_PREFIX)}
    own = {name.removeprefix(_ACTIVATION_PREFIX): weights.vector(name).clone() for name in activation_names}
    activation = activation_from_spec(described["activation"], own)
    weights.only(set(KEYS), activation_names)
    b_enc, b_dec = weights.vector("b_enc"), weights.vector("b_dec")
    d_sae, d_model = b_enc.shape[0], b_dec.shape[0]
    return StoredSAE(
        weights.path,
        FORMAT,
        weights.matrix("W_enc", d_sae, d_model, "rows"),
        b_enc,
        weights.matrix("W_dec", d_sae, d_model, "rows"),
        b_dec,
        weights.memory_mapped,
        activation=activation,
        layer=described["layer"],
        origin=SAESource.from_dict(described["source"]),
    )


def _parse(metadata: Mapping[str, str]) -> dict[str, Any]:
    described = json_file.parse(metadata[METADATA_KEY], "its metadata")
    version = described.get("version")
    if version != VERSION:
        raise UserValueError(f"format version {version!r}, but this version of the package reads {VERSION}")
    if described.keys() != {"version", "activation", "layer", "source"}:
        raise UserValueError(f"its metadata has the entries {sorted(described)}")
    if described["layer"] is not None:
        as_integer(f"its layer is {shown(described['layer'])}, which", described["layer"], least=0)
    return described
