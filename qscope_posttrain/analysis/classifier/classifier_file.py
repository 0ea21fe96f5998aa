"""Read and write the classifier file: one safetensors file whose metadata is one JSON document. It can hold no code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.features.feature_set_file import open_document, write_document
from qscope_posttrain.provenance import package_versions

FORMAT = "qscope_posttrain.feature_classifier"
VERSION = 1
MAX_BYTES = 64 * 1024**2  # A classifier has kilobytes; a larger file is refused before anything is read
TENSORS = {
    "feature_layers_": np.int64, "feature_ids_": np.int64, "weights_": np.float64, "thresholds_": np.float64,
    "differences_": np.float64, "positive_rates_": np.float64, "negative_rates_": np.float64,
}  # fmt: skip
PARAMETERS = ("k", "rule", "layer", "n_layers", "thresholds", "epsilon", "selection", "C", "random_state")
KEYS = {
    "version", "parameters", "classes", "intercept", "layer_widths", "top1_differences", "settings", "origin",
    "versions",
}  # fmt: skip
SETTINGS: dict[str, Any] = {"pooling": str, "max_length": int, "outlier_factor": (int, float), "median_norms": dict}

Tensors = Mapping[str, np.ndarray]


def write_classifier_file(path: str | Path, document: Mapping[str, Any], tensors: Tensors) -> Path:
    """Write `document` (all `KEYS` but the versions) and the tensors `TENSORS` in one step; the folder must exist."""
    path = Path(path)
    document = {**document, "version": VERSION, "versions": package_versions()}
    content = {name: torch.from_numpy(np.array(tensors[name], dtype)) for name, dtype in TENSORS.items()}
    return write_document(path, FORMAT, document, content, "classes and parameters")


def read_classifier_file(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read (document, tensors) with every field checked but the parameters; keys that are layers become integers."""
    if not path.exists():
        raise UserFileNotFoundError(f"No classifier file at {path}.")
    with open_document(path, "classifier", FORMAT, VERSION, MAX_BYTES) as (file, document):
        _check_document(path, document)
        found = set(file.keys())
        if found != set(TENSORS):
            raise UserValueError(f"{path} must hold the tensors {sorted(TENSORS)}, it holds {sorted(found)[:20]}.")
        tensors = {name: file.get_tensor(name).numpy() for name in TENSORS}
    _check_tensors(path, tensors, document["layer_widths"])
    return document, tensors


def check_origin(path: Path, stored: Any, found: Mapping[str, Any], layers: set[int]) -> None:
    """Check that kind and shape of the model, and the hashes of the SAEs in use, are those of the training."""
    if not isinstance(stored, dict) or not all(isinstance(stored.get(key), dict) for key in ("model", "saes")):
        raise UserValueError(
            f"{path} does not name the model and SAEs that it was made with: it can classify features only."
        )
    differences = [
        f"{key}: {stored['model'].get(key)!r} in the file, {found['model'][key]!r} here"
        for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        if stored["model"].get(key) != found["model"][key]
    ]
    for layer in sorted(layers):
        source, here = stored["saes"].get(str(layer)), found["saes"].get(str(layer))
        if here is None or not isinstance(source, dict):
            differences.append(f"no SAE of layer {layer} {'here' if here is None else 'in the file'}")
        elif source.get("sha256") != here["sha256"]:
            differences.append(
                f"SAE of layer {layer}: sha256 {source.get('sha256')} in the file, {here['sha256']} here"
            )
    if differences:
        raise UserValueError(f"{path} was made with another model or other SAEs: {'; '.join(differences)}.")


def _check_document(path: Path, document: Any) -> None:
    """Check every field but the parameters; keys that are layers become integers."""

    def need(fits: bool, message: str) -> None:
        if not fits:
            raise UserValueError(f"{path}{message}.")

    found = sorted(document)
    need(set(document) == KEYS, f": the classifier document must have the keys {sorted(KEYS)}, got {found!s:.300}")
    parameters, classes, intercept = map(document.get, ("parameters", "classes", "intercept"))
    widths, top, settings = map(document.get, ("layer_widths", "top1_differences", "settings"))
    fits = isinstance(parameters, dict) and set(parameters) == set(PARAMETERS)
    need(fits, f": parameters must be {', '.join(PARAMETERS)}, got {parameters!s:.300}")
    for name in ("layer", "random_state"):
        fits = parameters[name] is None or type(parameters[name]) is int
        need(fits, f": {name} must be a whole number or null, got {parameters[name]!r:.100}")
    fits = isinstance(classes, list) and len(classes) == 2 and type(classes[0]) is type(classes[1])
    fits = fits and type(classes[0]) in (str, int, bool, float) and classes[0] < classes[1]
    need(fits, f": classes must be two plain values of one type, ascending, got {classes!r:.200}")
    need(_is_number(intercept), f": intercept must be a finite number, got {intercept!r:.100}")
    fits = _by_layer(widths, lambda width: type(width) is int and 1 <= width < 2**31) and bool(widths)
    need(fits, f": layer_widths must give each layer a width, got {widths!r:.200}")
    fits = _by_layer(top, lambda value: _is_number(value) and -1 <= value <= 1) and set(top) <= set(widths)
    need(fits, f": top1_differences must give layers a number in [-1, 1], got {top!r:.200}")
    document["layer_widths"] = {int(layer): width for layer, width in widths.items()}
    document["top1_differences"] = {int(layer): float(value) for layer, value in top.items()}
    if settings is not None:
        fits = isinstance(settings, dict) and set(settings) == set(SETTINGS)
        fits = fits and all(isinstance(settings[name], kind) for name, kind in SETTINGS.items())
        need(fits, f": settings must be {', '.join(SETTINGS)}, got {settings!s:.300}")
        norms = settings["median_norms"]
        fits = _by_layer(norms, lambda norm: _is_number(norm) and norm > 0)
        need(fits, ": median_norms must give each layer a number above 0")
        settings["median_norms"] = {int(layer): float(norm) for layer, norm in norms.items()}


def _check_tensors(path: Path, tensors: Tensors, widths: Mapping[int, int]) -> None:
    rows = tensors["weights_"].size
    for name, tensor in tensors.items():
        if tensor.dtype != TENSORS[name] or tensor.shape != (rows,) or rows == 0:
            raise UserValueError(
                f"{path}: {name} must be {np.dtype(TENSORS[name])} [S], one per feature, "
                f"got {tensor.dtype} {list(tensor.shape)}."
            )
        if not np.isfinite(tensor).all():
            raise UserValueError(f"{path}: {name} holds values that are not finite numbers.")
        if name.endswith("_rates_") and not ((tensor >= 0) & (tensor <= 1)).all():
            raise UserValueError(f"{path}: {name} must lie in [0, 1].")
    if (tensors["thresholds_"] < 0).any():
        raise UserValueError(f"{path}: thresholds must not be below 0.")
    pairs = list(zip(tensors["feature_layers_"].tolist(), tensors["feature_ids_"].tolist(), strict=True))
    wrong = [(layer, feature) for layer, feature in pairs if not 0 <= feature < widths.get(layer, 0)]
    if wrong or len(set(pairs)) != rows:
        raise UserValueError(
            f"{path}: (layer, feature) pairs must be distinct and within {widths}; got {wrong[:5] or pairs}."
        )


def _by_layer(value: Any, allowed: Callable[[Any], bool]) -> bool:
    """Whether `value` is an object from layer numbers to allowed values."""
    if not isinstance(value, dict):
        return False
    names = all(key.isascii() and key.isdecimal() and len(key) < 6 for key in value)
    return names and all(map(allowed, value.values()))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
