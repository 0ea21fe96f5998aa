"""A classifier on disk: what comes back, and what is refused."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from qscope_posttrain.analysis.classifier.classifier_file import FORMAT, MAX_BYTES
from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier
from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer


@pytest.fixture(scope="module")
def featurizer(make_model, tiny_tokenizer, make_sae):
    saes = {}
    for layer in (1, 3):
        sae = make_sae(layer)
        saes[layer] = replace(sae, source=replace(sae.source, sha256=f"{layer:064d}"))
    return TextFeaturizer(make_model(), tiny_tokenizer, saes, outlier_factor=1.5)


@pytest.fixture(scope="module")
def lines(texts):
    return [*texts["en"], *texts["zh"]], ["plain"] * 4 + ["target"] * 4


@pytest.fixture(scope="module")
def fitted(featurizer, lines):
    return FeatureClassifier(k=2, rule="logistic", n_layers=2, featurizer=featurizer).fit(*lines)


def test_round_trip_with_texts(fitted, featurizer, lines, tmp_path):
    path = fitted.save(tmp_path / "classifier.safetensors")
    # A fresh featurizer with other settings: those of the training are stored and taken over.
    fresh = TextFeaturizer(featurizer.model, featurizer.tokenizer, featurizer.saes, outlier_factor=99.0)
    loaded = FeatureClassifier.load(path, fresh)
    np.testing.assert_array_equal(loaded.decision_function(lines[0]), fitted.decision_function(lines[0]))
    np.testing.assert_array_equal(loaded.predict(lines[0][:1]), fitted.predict(lines[0][:1]))
    assert loaded.featurizer_.outlier_factor == 1.5
    assert loaded.get_params()["k"] == 2
    assert path.read_bytes() == loaded.save(tmp_path / "again.safetensors").read_bytes()
    assert path.stat().st_size < 10_000


def test_round_trip_with_features_alone(fitted, featurizer, lines, tmp_path):
    path = fitted.save(tmp_path / "classifier.safetensors")
    loaded = FeatureClassifier.load(path)
    features = featurizer.features(lines[0])
    assert loaded.predict(features).tolist() == fitted.predict(features).tolist()
    assert path.read_bytes() == loaded.save(tmp_path / "again.safetensors").read_bytes()
    with pytest.raises(ValueError, match="not fitted or loaded with a featurizer"):
        loaded.predict(lines[0])


@pytest.mark.parametrize("labels", [[0, 1], [False, True], ["a", "b"], [0.0, 1.0]])
def test_classes_keep_their_type(labels, tmp_path):
    matrix = np.array([[0.0], [1.0], [0.0], [1.0]])
    classifier = FeatureClassifier().fit(matrix, labels * 2)
    loaded = FeatureClassifier.load(classifier.save(tmp_path / "c.safetensors"))
    assert loaded.predict(matrix).tolist() == labels * 2
    assert loaded.classes_.dtype == classifier.classes_.dtype
    assert loaded.n_features_in_ == 1


def test_another_model_or_sae_is_named(fitted, featurizer, make_model, make_sae, tmp_path):
    path = fitted.save(tmp_path / "c.safetensors")
    other = TextFeaturizer(make_model("llama"), featurizer.tokenizer, featurizer.saes)
    with pytest.raises(ValueError, match="model_type: 'qwen3' in the file, 'llama' here"):
        FeatureClassifier.load(path, other)
    with pytest.raises(ValueError, match="no SAE of layer 3 here"):
        FeatureClassifier.load(path, TextFeaturizer(featurizer.model, featurizer.tokenizer, {1: featurizer.saes[1]}))
    with pytest.raises(ValueError, match=r"SAE of layer 1: sha256 0{63}1 in the file, None here"):
        FeatureClassifier.load(
            path, TextFeaturizer(featurizer.model, featurizer.tokenizer, {1: make_sae(1), 3: make_sae(3)})
        )


def test_a_classifier_of_features_cannot_read_texts(featurizer, tmp_path):
    path = FeatureClassifier().fit(np.eye(4), [0, 0, 1, 1]).save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="it can classify features only"):
        FeatureClassifier.load(path, featurizer)


def tampered(path, target, document=None, tensors=None):
    """A copy of a classifier file with some keys of its document and some tensors replaced."""
    with safe_open(str(path), framework="numpy") as file:
        content = json.loads(file.metadata()[FORMAT])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content |= document or {}
    arrays |= tensors or {}
    text = json.dumps({key: value for key, value in content.items() if value != "absent"})
    save_file({name: array for name, array in arrays.items() if array is not None}, target, metadata={FORMAT: text})
    return target


NAN = np.array([np.nan, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("document", "tensors", "message"),
    [
        ({"version": 2}, {}, "classifier version 2"),
        ({"origin": "absent"}, {}, "must have the keys"),
        ({"code": "import os"}, {}, "must have the keys"),
        ({"parameters": {"k": 1}}, {}, "parameters must be"),
        ({"classes": ["a"]}, {}, "two plain values"),
        ({"classes": ["b", "a"]}, {}, "ascending"),
        ({"classes": [0, "a"]}, {}, "one type"),
        ({"classes": [[0], [1]]}, {}, "two plain values"),
        ({"intercept": None}, {}, "intercept must be a finite number"),
        ({"intercept": True}, {}, "intercept must be a finite number"),
        ({"layer_widths": {"1": -5}}, {}, "layer_widths must"),
        ({"layer_widths": {"-1": 5}}, {}, "layer_widths must"),
        ({"layer_widths": {"1": 10**12, "3": 5}}, {}, "layer_widths must"),
        ({"top1_differences": {"1": 2.0, "3": 0.0}}, {}, "top1_differences must"),
        ({"settings": {"pooling": "max"}}, {}, "settings must be"),
        ({}, {"weights_": None}, "must hold the tensors"),
        ({}, {"weights_": NAN}, "weights_ holds values that are not finite"),
        ({}, {"weights_": np.zeros(4, np.float32)}, r"weights_ must be float64 \[S\]"),
        ({}, {"weights_": np.zeros((2, 2))}, r"must be float64 \[S\]"),
        ({}, {"feature_ids_": np.array([0, 1, 2, 10**6])}, "within"),
        ({}, {"feature_ids_": np.array([0, 1, 2, -1])}, "within"),
        ({}, {"feature_layers_": np.array([1, 1, 1, 2])}, "within"),
        ({}, {"feature_ids_": np.zeros(4, np.int64), "feature_layers_": np.ones(4, np.int64)}, "distinct"),
        ({}, {"thresholds_": np.full(4, -1.0)}, "thresholds must not be below 0"),
        ({}, {"positive_rates_": np.full(4, 1.5)}, r"must lie in \[0, 1\]"),
    ],
)
def test_tampered_files_are_refused(fitted, tmp_path, document, tensors, message):
    path = tampered(fitted.save(tmp_path / "c.safetensors"), tmp_path / "bad.safetensors", document, tensors)
    with pytest.raises(ValueError, match=message):
        FeatureClassifier.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "exec"}, "rule must be one of"),
        ({"k": "1"}, "k must be"),
        ({"random_state": [1]}, "random_state must"),
    ],
)
def test_tampered_parameters_are_refused(fitted, tmp_path, changes, message):
    path = fitted.save(tmp_path / "c.safetensors")
    with safe_open(str(path), framework="numpy") as file:
        parameters = json.loads(file.metadata()[FORMAT])["parameters"]
    bad = tampered(path, tmp_path / "bad.safetensors", {"parameters": parameters | changes})
    with pytest.raises(ValueError, match=message):
        FeatureClassifier.load(bad)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError, match="No classifier file"):
        FeatureClassifier.load(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        FeatureClassifier.load(path)
    save_file({"x": np.zeros(1)}, path)
    with pytest.raises(ValueError, match="its metadata has no"):
        FeatureClassifier.load(path)
    save_file({"x": np.zeros(1)}, path, metadata={FORMAT: "[" * 100_000})
    with pytest.raises(ValueError, match="not valid JSON"):
        FeatureClassifier.load(path)
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="at most"):
        FeatureClassifier.load(path)


def test_an_unfitted_classifier_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="not fitted"):
        FeatureClassifier().save(tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())
