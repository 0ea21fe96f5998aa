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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.features.explain.explanation import Explanation
from qscope_posttrain.features.layer_features import TENSOR_FIELDS, LayerFeatures
from qscope_posttrain.files import check_is_file, replacing

FORMAT = "qscope_posttrain.feature_set"
VERSION = 1
FILE_NAME = "features.safetensors"
"""What commands call it"""
MAX_BYTES = 2 * 1024**3
"""A FeatureSet is kilobytes to megabytes; a larger file is refused before anything is allocated."""
DOCUMENT_KEYS = {"version", "model", "languages", "settings", "provenance", "layers"}
EXPLANATIONS = "explanations"
"""The one key that may be absent: files from before there were explanations are read, and stay as they were."""
_LAYER = re.compile("0|[1-9][0-9]{0,5}")
LAYER_KEYS = {"labels", "names", "residual_median_norm"}


def feature_set_path(path: str | Path) -> Path:
    """The file that `path` means: itself, or FILE_NAME in the folder that it is."""
    place = Path(path)
    return place / FILE_NAME if place.is_dir() else place


def write_feature_set(
    path: str | Path,
    *,
    model: Mapping[str, Any],
    languages: tuple[str, ...],
    layers: Mapping[int, LayerFeatures],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    explanations: Sequence[Explanation] = (),
) -> Path:
    """Write the parts of a FeatureSet to `path`; the folder must exist. Returns the path of the file."""
    path = feature_set_path(path)
    document: dict[str, Any] = {
        "version": VERSION,
        "model": dict(model),
        "languages": list(languages),
        "settings": dict(settings),
        "provenance": dict(provenance),
        "layers": {
            str(layer): {
                "labels": list(rows.labels),
                "names": list(rows.names),
                "residual_median_norm": None if math.isnan(rows.residual_median_norm) else rows.residual_median_norm,
            }
            for layer, rows in layers.items()
        },
    }
    if explanations:
        document[EXPLANATIONS] = [entry.to_dict() for entry in explanations]
    try:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UserValueError(f"FeatureSet.model, .settings and .provenance must be JSON values: {error}.") from error
    tensors = {
        f"layers.{layer}.{name}": getattr(rows, name).contiguous().clone()  # the format shares no memory
        for layer, rows in layers.items()
        for name in TENSOR_FIELDS
    }
    with replacing(path) as unfinished:
        unfinished.write_bytes(save(tensors, metadata={FORMAT: text}))
    return path


def read_feature_set(path: str | Path) -> dict[str, Any]:
    """The parts of a FeatureSet, as keyword arguments of its constructor; every field is validated. `path` is the file,
    or the folder that holds it as FILE_NAME."""
    path = feature_set_path(path)
    if not path.exists():
        raise UserFileNotFoundError(f"No FeatureSet file at {path}: give {FILE_NAME}, or the folder that holds it.")
    check_is_file(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserValueError(f"{path} has {size} bytes; a FeatureSet has at most {MAX_BYTES}. It is something else.")
    try:
        with safe_open(str(path), framework="pt") as file:
            document = _parse_document(path, (file.metadata() or {}).get(FORMAT))
            _check_tensor_names(path, set(file.keys()), document["layers"])
            layers = {int(layer): _read_layer(path, file, layer, facts) for layer, facts in document["layers"].items()}
    except (SafetensorError, OSError) as error:
        raise UserValueError(f"{path} is not a readable safetensors file: {error}.") from error
    return {
        "model": document["model"],
        "languages": tuple(document["languages"]),
        "layers": layers,
        "settings": document["settings"],
        "provenance": document["provenance"],
        "explanations": _read_explanations(path, document.get(EXPLANATIONS, [])),
    }


def _parse_document(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        raise UserValueError(f"{path} is not a FeatureSet: its metadata has no {FORMAT!r}.")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserValueError(f"{path}: the FeatureSet document is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise UserValueError(f"{path}: the FeatureSet document must be an object, got {type(document).__name__}.")
    if document.get("version") != VERSION:
        raise UserValueError(
            f"{path} has FeatureSet version {document.get('version')!r}; this package reads version {VERSION}."
        )
    _check_keys(path, "the FeatureSet document", document, DOCUMENT_KEYS | ({EXPLANATIONS} & set(document)))
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
    return document


def _check_layer_facts(path: Path, layer: str, facts: Any) -> None:
    if not _LAYER.fullmatch(layer):
        raise UserValueError(f"{path}: {layer[:80]!r} is not a layer number.")
    if not isinstance(facts, dict):
        raise UserValueError(f"{path}: layer {layer} must be an object, got {type(facts).__name__}.")
    _check_keys(path, f"layer {layer}", facts, LAYER_KEYS)
    _check_strings(path, f"labels of layer {layer}", facts["labels"])
    _check_strings(path, f"names of layer {layer}", facts["names"])
    norm = facts["residual_median_norm"]
    if norm is not None and (type(norm) not in (int, float) or not abs(norm) <= sys.float_info.max):
        raise UserValueError(f"{path}: residual_median_norm of layer {layer} must be a number, got {norm!r:.80}.")


def _read_explanations(path: Path, found: Any) -> tuple[Explanation, ...]:
    if not isinstance(found, list):
        raise UserValueError(f"{path}: {EXPLANATIONS} must be a list, got {type(found).__name__}.")
    try:
        return tuple(Explanation.from_dict(entry) for entry in found)
    except ValueError as error:
        raise UserValueError(f"{path}: {error}") from error


def _check_tensor_names(path: Path, found: set[str], layers: Mapping[str, Any]) -> None:
    expected = {f"layers.{layer}.{name}" for layer in layers for name in TENSOR_FIELDS}
    if found != expected:
        raise UserValueError(
            f"{path}: the tensors do not match the document; missing {sorted(expected - found)}, "
            f"unexpected {sorted(found - expected)}."
        )


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


def _check_keys(path: Path, what: str, value: Mapping[str, Any], expected: set[str]) -> None:
    if set(value) != expected:
        raise UserValueError(
            f"{path}: {what} must have the keys {sorted(expected)}; missing {sorted(expected - set(value))}, "
            f"unexpected {sorted(set(value) - expected)}."
        )


def _check_strings(path: Path, what: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserValueError(f"{path}: {what} must be a list of strings, got {value!r:.200}.")
