"""The package's own file: one SAE in canonical form, as safetensors.

Tensors W_enc [d_sae, d_model], b_enc [d_sae], W_dec [d_sae, d_model], b_dec [d_model], and those of the activation
("activation.threshold"). One metadata entry holds JSON: format version, activation, layer and source. The bytes are a
function of the content, so that equal SAEs have equal files.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import parse_object, replacing
from qscope_posttrain.sae.activations import activation_from_spec, activation_to_spec
from qscope_posttrain.sae.checks import as_integer, shown
from qscope_posttrain.sae.formats.stored import Layout, StoredSAE, read_stored, unshared
from qscope_posttrain.sae.source import LocatedFile, SAESource
from qscope_posttrain.sae.weights_file import WeightsFile

if TYPE_CHECKING:
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

VERSION = 1
KEYS = ("W_enc", "b_enc", "W_dec", "b_dec")
METADATA_KEY = "qscope_posttrain.sae"
_ACTIVATION_PREFIX = "activation."


def write_file(path: Path, sae: SparseAutoencoder) -> Path:
    """Write an SAE; `path` appears whole or not at all, also when the process is killed."""
    if path.suffix != ".safetensors":
        raise UserValueError(f"an SAE is saved as safetensors: end the file name in .safetensors, got {path.name!r}")
    settings, activation_tensors = activation_to_spec(sae.activation)
    source = asdict(sae.source.origin or sae.source)
    described = {"version": VERSION, "activation": settings, "layer": sae.layer, "source": source}
    tensors = {name: getattr(sae, name) for name in KEYS}
    tensors |= {_ACTIVATION_PREFIX + name: tensor for name, tensor in activation_tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        save_file(unshared(tensors), unfinished, metadata={METADATA_KEY: json.dumps(described, sort_keys=True)})
    return path


def recognizes(weights: WeightsFile) -> bool:
    return weights.kind == "safetensors" and METADATA_KEY in weights.metadata


def open_file(weights: WeightsFile, located: LocatedFile) -> StoredSAE:
    described = parse_object(weights.metadata[METADATA_KEY], "its metadata", unique=True)
    version, layer = described.get("version"), described.get("layer")
    if version != VERSION:
        raise UserValueError(f"format version {version!r}, but this version of the package reads {VERSION}")
    if described.keys() != {"version", "activation", "layer", "source"}:
        raise UserValueError(f"its metadata has the entries {sorted(described)}")
    if layer is not None:
        as_integer(f"its layer is {shown(layer)}, which", layer, least=0)
    own = {name: weights.tensor(name, None).clone() for name in weights.names if name.startswith(_ACTIVATION_PREFIX)}
    tensors = {name.removeprefix(_ACTIVATION_PREFIX): tensor for name, tensor in own.items()}
    activation = activation_from_spec(described["activation"], tensors)
    layout = Layout("native", KEYS, "rows, rows", tuple(own))
    layout.check(weights)
    origin = SAESource.from_dict(described["source"])
    return read_stored(weights, located, layout, activation=activation, layer=layer, origin=origin)
