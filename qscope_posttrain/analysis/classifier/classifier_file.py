"""The classifier file: one safetensors file whose metadata is a single JSON document. It can hold no code."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qscope_posttrain.analysis.classifier.columns import LayerColumns
from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.files import check_is_file, replacing
from qscope_posttrain.provenance import package_versions

if TYPE_CHECKING:
    from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier
    from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer

FORMAT = "qscope_posttrain.feature_classifier"
VERSION = 1
MAX_BYTES = 64 * 1024**2
"""A classifier is kilobytes; a larger file is refused before anything is read."""
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


def write_classifier(path: str | Path, classifier: FeatureClassifier) -> Path:
    """Write a fitted classifier to `path`; the folder must exist. Returns the path.

    Raises:
        ValueError: classes that JSON cannot hold.
    """
    path = Path(path)
    document = {
        "version": VERSION,
        "parameters": {name: _plain(getattr(classifier, name)) for name in PARAMETERS},
        "classes": classifier.classes_.tolist(),
        "intercept": float(classifier.intercept_),
        "layer_widths": dict(
            zip(map(str, classifier.layer_columns_.layers), classifier.layer_columns_.widths, strict=True)
        ),
        "top1_differences": {str(layer): value for layer, value in classifier.top1_differences_.items()},
        "settings": classifier.settings_,
        "origin": classifier.origin_,
        "versions": package_versions(),
    }
    try:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UserValueError(f"classes and parameters must be JSON values: {error}.") from error
    tensors = {name: np.ascontiguousarray(getattr(classifier, name), dtype) for name, dtype in TENSORS.items()}
    with replacing(path) as unfinished:
        unfinished.write_bytes(save(tensors, metadata={FORMAT: text}))
    return path


def read_classifier(path: str | Path, featurizer: TextFeaturizer | None) -> FeatureClassifier:
    """A fitted classifier from its file; every field is checked."""
    from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier

    path = Path(path)
    document, tensors = _read(path)
    columns = LayerColumns.from_widths({int(layer): width for layer, width in document["layer_widths"].items()})
    _check_tensors(path, tensors, columns)
    classifier = FeatureClassifier(**document["parameters"])
    try:
        classifier._check_parameters()
    except (TypeError, ValueError) as error:
        raise UserValueError(f"{path}: {error}") from error
    for name, tensor in tensors.items():
        setattr(classifier, name, tensor)
    classifier.classes_ = np.array(document["classes"])
    classifier.intercept_ = float(document["intercept"])
    classifier.layer_columns_ = columns
    classifier.layer_widths = dict(zip(columns.layers, columns.widths, strict=True))
    classifier.n_features_in_ = columns.total
    classifier.top1_differences_ = {int(layer): float(d) for layer, d in document["top1_differences"].items()}
    classifier.origin_ = document["origin"]
    classifier.settings_ = _settings(path, document["settings"])
    classifier.featurizer_ = None
    if featurizer is not None:
        used = set(tensors["feature_layers_"].tolist())
        _check_origin(path, document["origin"], featurizer.origin(), used)
        classifier.adopt(featurizer.with_settings(classifier.settings_ or {}))
        classifier.featurizer = classifier.featurizer_
    return classifier


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.exists():
        raise UserFileNotFoundError(f"No classifier file at {path}.")
    size = check_is_file(path).stat().st_size
    if size > MAX_BYTES:
        raise UserValueError(f"{path} has {size} bytes; a classifier has at most {MAX_BYTES}. It is something else.")
    try:
        with safe_open(str(path), framework="numpy") as file:
            document = _parse(path, (file.metadata() or {}).get(FORMAT))
            found = set(file.keys())
            if found != set(TENSORS):
                raise UserValueError(f"{path} must hold the tensors {sorted(TENSORS)}, it holds {sorted(found)[:20]}.")
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except (SafetensorError, OSError) as error:
        raise UserValueError(f"{path} is not a readable safetensors file: {error}.") from error
    return document, tensors


def _parse(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        raise UserValueError(f"{path} is not a classifier: its metadata has no {FORMAT!r}.")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserValueError(f"{path}: the classifier document is not valid JSON: {error}.") from error
    if not isinstance(document, dict) or set(document) != KEYS:
        found = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise UserValueError(f"{path}: the classifier document must have the keys {sorted(KEYS)}, got {found!s:.300}.")
    if document["version"] != VERSION:
        raise UserValueError(f"{path} has classifier version {document['version']!r}; this package reads {VERSION}.")
    parameters, classes = document["parameters"], document["classes"]
    if not isinstance(parameters, dict) or set(parameters) != set(PARAMETERS):
        raise UserValueError(f"{path}: parameters must be {', '.join(PARAMETERS)}, got {parameters!s:.300}.")
    for name in ("layer", "random_state"):
        if parameters[name] is not None and type(parameters[name]) is not int:
            raise UserValueError(f"{path}: {name} must be a whole number or null, got {parameters[name]!r:.100}.")
    alike = isinstance(classes, list) and len(classes) == 2 and type(classes[0]) is type(classes[1])
    if not alike or type(classes[0]) not in (str, int, bool, float) or not classes[0] < classes[1]:
        raise UserValueError(f"{path}: classes must be two plain values of one type, ascending, got {classes!r:.200}.")
    if not _is_number(document["intercept"]):
        raise UserValueError(f"{path}: intercept must be a finite number, got {document['intercept']!r:.100}.")
    widths, top = document["layer_widths"], document["top1_differences"]
    if not _by_layer(widths, lambda width: type(width) is int and 1 <= width < 2**31) or not widths:
        raise UserValueError(f"{path}: layer_widths must give each layer a width, got {widths!r:.200}.")
    if not _by_layer(top, lambda value: _is_number(value) and -1 <= value <= 1) or not set(top) <= set(widths):
        raise UserValueError(f"{path}: top1_differences must give layers a number in [-1, 1], got {top!r:.200}.")
    return document


def _check_tensors(path: Path, tensors: Mapping[str, np.ndarray], columns: LayerColumns) -> None:
    rows = tensors["weights_"].size
    for name, tensor in tensors.items():
        if tensor.dtype != TENSORS[name] or tensor.shape != (rows,) or rows == 0:
            raise UserValueError(
                f"{path}: {name} must be {np.dtype(TENSORS[name])} [S], one a feature, "
                f"got {tensor.dtype} {list(tensor.shape)}."
            )
        if not np.isfinite(tensor).all():
            raise UserValueError(f"{path}: {name} holds values that are not finite numbers.")
    for name in ("positive_rates_", "negative_rates_"):
        if not ((tensors[name] >= 0) & (tensors[name] <= 1)).all():
            raise UserValueError(f"{path}: {name} must lie in [0, 1].")
    if (tensors["thresholds_"] < 0).any():
        raise UserValueError(f"{path}: thresholds must not be below 0.")
    width = dict(zip(columns.layers, columns.widths, strict=True))
    pairs = list(zip(tensors["feature_layers_"].tolist(), tensors["feature_ids_"].tolist(), strict=True))
    wrong = [(layer, feature) for layer, feature in pairs if not 0 <= feature < width.get(layer, 0)]
    if wrong or len(set(pairs)) != rows:
        raise UserValueError(
            f"{path}: (layer, feature) pairs must be distinct and within {width}; got {wrong[:5] or pairs}."
        )


def _settings(path: Path, settings: Any) -> dict[str, Any] | None:
    if settings is None:
        return None
    ok = isinstance(settings, dict) and set(settings) == set(SETTINGS)
    if not ok or any(not isinstance(settings[name], kind) for name, kind in SETTINGS.items()):
        raise UserValueError(f"{path}: settings must be {', '.join(SETTINGS)}, got {settings!s:.300}.")
    if not _by_layer(settings["median_norms"], lambda norm: _is_number(norm) and norm > 0):
        raise UserValueError(f"{path}: median_norms must give each layer a number above 0.")
    return {**settings, "median_norms": {int(layer): float(n) for layer, n in settings["median_norms"].items()}}


def _check_origin(path: Path, stored: Any, found: Mapping[str, Any], layers: set[int]) -> None:
    """The model's kind and shape, and the hashes of the SAEs that are used, must be those of the training."""
    if not isinstance(stored, dict) or not all(isinstance(stored.get(key), dict) for key in ("model", "saes")):
        raise UserValueError(
            f"{path} does not say which model and SAEs it was made with: it can classify features only."
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


def _by_layer(value: Any, allowed: Any) -> bool:
    """Whether `value` is an object from layer numbers to allowed values."""
    if not isinstance(value, dict):
        return False
    return all(key.isascii() and key.isdecimal() and len(key) < 6 for key in value) and all(
        map(allowed, value.values())
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _plain(value: Any) -> Any:
    """A numpy scalar as the number it is; a generator of random numbers has no place in a file."""
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, str | int | float) else None
