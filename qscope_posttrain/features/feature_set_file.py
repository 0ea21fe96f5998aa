"""The FeatureSet file: one safetensors file whose metadata is a single JSON document.

Tensors are named `layers.<n>.<field>`; everything that is not a tensor is in the document under the key
`qscope_posttrain.feature_set`. One key, because the header keeps several in no particular order and equal
FeatureSets shall give equal bytes.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.features.explain.explanation import Explanation
from qscope_posttrain.features.layer_features import TENSOR_FIELDS, LayerFeatures
from qscope_posttrain.files import check_is_file, replacing

if TYPE_CHECKING:
    from qscope_posttrain.features.feature_set import FeatureSet

FORMAT = "qscope_posttrain.feature_set"
VERSION = 1
FILE_NAME = "features.safetensors"
MAX_BYTES = 2 * 1024**3  # A FeatureSet is kilobytes to megabytes; a larger file is refused before anything is allocated
DOCUMENT_KEYS = {"version", "model", "languages", "settings", "provenance", "layers"}
EXPLANATIONS = "explanations"  # The one key that may be absent, as in files of the first version
_LAYER = re.compile("0|[1-9][0-9]{0,5}")
LAYER_KEYS = {"labels", "names", "residual_median_norm"}


def feature_set_path(path: str | Path) -> Path:
    """The file that `path` means: itself, or FILE_NAME in the folder that it is."""
    place = Path(path)
    return place / FILE_NAME if place.is_dir() else place


def write_feature_set(path: str | Path, features: FeatureSet) -> Path:
    """Write a FeatureSet to `path`; the folder must exist. Returns the path of the file."""
    path = feature_set_path(path)
    document: dict[str, Any] = {"version": VERSION, "languages": list(features.languages), "layers": {}}
    document |= {name: dict(getattr(features, name)) for name in ("model", "settings", "provenance")}
    for layer, rows in features.layers.items():
        norm = None if math.isnan(rows.residual_median_norm) else rows.residual_median_norm
        facts = {"labels": list(rows.labels), "names": list(rows.names), "residual_median_norm": norm}
        document["layers"][str(layer)] = facts
    if features.explanations:
        document[EXPLANATIONS] = [entry.to_dict() for entry in features.explanations]
    tensors = {
        f"layers.{layer}.{name}": getattr(rows, name).contiguous().clone()  # the format shares no memory
        for layer, rows in features.layers.items()
        for name in TENSOR_FIELDS
    }
    return write_document(path, FORMAT, document, tensors, "FeatureSet.model, .settings and .provenance")


def read_feature_set(path: str | Path) -> dict[str, Any]:
    """The parts of a FeatureSet, as keyword arguments of its constructor; every field is validated. `path` is the file,
    or the folder that holds it as FILE_NAME."""
    path = feature_set_path(path)
    if not path.exists():
        raise UserFileNotFoundError(f"No FeatureSet file at {path}: give {FILE_NAME}, or the folder that holds it.")
    with open_document(path, "FeatureSet", FORMAT, VERSION, MAX_BYTES) as (file, document):
        _check_document(path, document)
        tensors = {f"layers.{layer}.{name}" for layer in document["layers"] for name in TENSOR_FIELDS}
        _check_keys(path, "the tensors", file.keys(), tensors)
        layers = {int(layer): _read_layer(path, file, layer, facts) for layer, facts in document["layers"].items()}
    explanations = document.get(EXPLANATIONS, [])
    if not isinstance(explanations, list):
        raise UserValueError(f"{path}: {EXPLANATIONS} must be a list, got {type(explanations).__name__}.")
    try:
        read = tuple(Explanation.from_dict(entry) for entry in explanations)
    except ValueError as error:
        raise UserValueError(f"{path}: {error}") from error
    parts = {name: document[name] for name in ("model", "settings", "provenance")}
    return {**parts, "languages": tuple(document["languages"]), "layers": layers, "explanations": read}


@contextmanager
def open_document(path: Path, kind: str, form: str, version: int, max_bytes: int) -> Iterator[tuple[Any, Any]]:
    """Open a safetensors file whose metadata is one JSON object under `form`: yields (file, object). ValueError: too
    large to be a `kind`, damaged, of another format or another version."""
    size = check_is_file(path).stat().st_size
    if size > max_bytes:
        raise UserValueError(f"{path} has {size} bytes; a {kind} has at most {max_bytes}. It is something else.")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(form)
            if text is None:
                raise UserValueError(f"{path} is not a {kind}: its metadata has no {form!r}.")
            try:
                document = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserValueError(f"{path}: the {kind} document is not valid JSON: {error}.") from error
            if not isinstance(document, dict):
                raise UserValueError(f"{path}: the {kind} document must be an object, got {type(document).__name__}.")
            if (found := document.get("version")) != version:
                raise UserValueError(f"{path} has {kind} version {found!r}; this package reads version {version}.")
            yield file, document
    except (SafetensorError, OSError) as error:
        raise UserValueError(f"{path} is not a readable safetensors file: {error}.") from error


def write_document(path: Path, form: str, document: Any, tensors: Mapping[str, Tensor], what: str) -> Path:
    """Write such a file in one step; the folder must exist. `what` names the parts that may not be JSON values."""
    try:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UserValueError(f"{what} must be JSON values: {error}.") from error
    with replacing(path) as unfinished:
        unfinished.write_bytes(save(dict(tensors), metadata={form: text}))
    return path


def _check_document(path: Path, document: dict[str, Any]) -> None:
    _check_keys(path, "the keys of the FeatureSet document", document, DOCUMENT_KEYS | ({EXPLANATIONS} & set(document)))
    for key in ("model", "settings", "provenance", "layers"):
        if not isinstance(document[key], dict):
            raise UserValueError(f"{path}: {key} must be an object, got {type(document[key]).__name__}.")
    for key in ("hidden_size", "num_hidden_layers"):
        value = document["model"].get(key)
        if type(value) is not int or value < 1:
            raise UserValueError(f"{path}: model.{key} must be a positive integer, got {value!r:.80}.")
    _check_strings(path, "languages", document["languages"])
    for layer, facts in document["layers"].items():
        _check_layer_facts(path, layer, facts)


def _check_layer_facts(path: Path, layer: str, facts: Any) -> None:
    if not _LAYER.fullmatch(layer):
        raise UserValueError(f"{path}: {layer[:80]!r} is not a layer number.")
    if not isinstance(facts, dict):
        raise UserValueError(f"{path}: layer {layer} must be an object, got {type(facts).__name__}.")
    _check_keys(path, f"the keys of layer {layer}", facts, LAYER_KEYS)
    _check_strings(path, f"labels of layer {layer}", facts["labels"])
    _check_strings(path, f"names of layer {layer}", facts["names"])
    norm = facts["residual_median_norm"]
    if norm is not None and (type(norm) not in (int, float) or not abs(norm) <= sys.float_info.max):
        raise UserValueError(f"{path}: residual_median_norm of layer {layer} must be a number, got {norm!r:.80}.")


def _read_layer(path: Path, file: Any, layer: str, facts: Mapping[str, Any]) -> LayerFeatures:
    norm = facts["residual_median_norm"]
    tensors = {name: file.get_tensor(f"layers.{layer}.{name}") for name in TENSOR_FIELDS}
    try:
        return LayerFeatures(
            **tensors,
            labels=tuple(facts["labels"]),
            names=tuple(facts["names"]),
            residual_median_norm=math.nan if norm is None else float(norm),
        )
    except ValueError as error:
        raise UserValueError(f"{path}, layer {layer}: {error}") from error


def _check_keys(path: Path, what: str, found: Collection[str], expected: set[str]) -> None:
    if set(found) != expected:
        raise UserValueError(
            f"{path}: {what} must be {sorted(expected)}; missing {sorted(expected - set(found))}, unexpected "
            f"{sorted(set(found) - expected)}."
        )


def _check_strings(path: Path, what: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserValueError(f"{path}: {what} must be a list of strings, got {value!r:.200}.")
