"""Explanations in a FeatureSet and its file: kept with their rows, old files unchanged, strict on reading."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from qscope_posttrain.features.explain.explanation import Explanation, FeatureId, Prediction
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.feature_set_file import FORMAT
from qscope_posttrain.features.find.contrast import find_language_features

PREDICTION = {"hits": 8, "positives": 10, "rejections": 3, "negatives": 6}


@pytest.fixture(scope="module")
def features(make_model, tiny_tokenizer, texts, saes):
    return find_language_features(make_model(), tiny_tokenizer, texts, saes, top=2)


@pytest.fixture
def explained(features):
    ids = [
        FeatureId(layer, feature) for layer, rows in features.layers.items() for feature in rows.feature_ids.tolist()
    ]
    first, second = list(dict.fromkeys(ids))[:2]
    return features.explained([
        Explanation(*first, "words for measuring flour", "judge", Prediction(**PREDICTION)),
        Explanation(*second, "кухня 🍲", "judge", fuzzing=Prediction(0, 0, 0, 0)),
    ])  # fmt: skip


def test_written_and_read_back(explained, tmp_path):
    loaded = FeatureSet.load(explained.save(tmp_path / "features.safetensors"))
    assert loaded.explanations == explained.explanations
    assert loaded.explanations[0].detection == Prediction(8, 10, 3, 6)
    assert loaded.explanations[0].fuzzing is None


def test_a_set_without_explanations_is_written_as_it_always_was(features, tmp_path):
    with safe_open(str(features.save(tmp_path / "plain.safetensors")), framework="pt") as file:
        assert set(json.loads(file.metadata()[FORMAT])) == {
            "version", "model", "languages", "settings", "provenance", "layers",
        }  # fmt: skip
    assert FeatureSet.load(tmp_path / "plain.safetensors").explanations == ()


def test_they_follow_their_rows(explained):
    layer, feature = explained.explanations[0].feature
    assert explained.select(layers=layer, feature_ids=feature).explanations == explained.explanations[:1]
    others = [other for other in explained.layers if other != layer]
    assert all(entry.layer != layer for entry in explained.select(layers=others).explanations)


def test_a_new_one_replaces_the_old(explained):
    first = explained.explanations[0]
    better = replace(first, text="weights and measures in recipes")
    again = explained.explained([better])
    assert {entry.text for entry in again.explanations} == {better.text, explained.explanations[1].text}
    with pytest.raises(ValueError, match="twice"):
        explained.explained([first, better])
    with pytest.raises(ValueError, match="does not hold"):
        explained.explained([replace(first, feature_id=10_000)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(explanations={}), "must be a list"),
        (lambda d: d.update(explanations=["text"]), "must be an object"),
        (lambda d: d["explanations"][0].pop("text"), "has the keys"),
        (lambda d: d["explanations"][0].update(code="x"), "has the keys"),
        (lambda d: d["explanations"][0].update(text=" "), "must be a text"),
        (lambda d: d["explanations"][0].update(model=None), "must be a name"),
        (lambda d: d["explanations"][0].update(layer="1"), "whole number"),
        (lambda d: d["explanations"][0].update(feature_id=True), "whole number"),
        (lambda d: d["explanations"][0].update(feature_id=10_000), "does not hold"),
        (lambda d: d["explanations"].append(d["explanations"][0]), "twice"),
        (lambda d: d["explanations"][0].update(detection=[1]), "must have the keys"),
        (lambda d: d["explanations"][0]["detection"].update(hits=11), "more often"),
        (lambda d: d["explanations"][0]["detection"].update(hits=0.5), "whole number"),
        (lambda d: d["explanations"][0]["detection"].update(extra=1), "must have the keys"),
    ],
)
def test_a_damaged_file_is_refused(explained, tmp_path, change, message):
    path = explained.save(tmp_path / "features.safetensors")
    with safe_open(str(path), framework="pt") as file:
        document = json.loads(file.metadata()[FORMAT])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    change(document)
    save_file(tensors, str(path), metadata={FORMAT: json.dumps(document)})
    with pytest.raises(ValueError, match=message):
        FeatureSet.load(path)


def test_balanced_accuracy_by_hand():
    found = Prediction(8, 10, 3, 6)
    assert found.balanced_accuracy == pytest.approx((0.8 + 0.5) / 2)
    interval = found.interval()
    assert interval.estimate == pytest.approx(0.65)
    assert 0 < interval.low < 0.65 < interval.high < 1
    larger = Prediction(800, 1000, 300, 600).interval()
    assert (larger.high - larger.low) / 2 == pytest.approx(1.96 * ((0.16 / 1000 + 0.25 / 600) / 4) ** 0.5, rel=0.02)
    assert Prediction(3, 3, 0, 0).balanced_accuracy is None
    assert Prediction(0, 0, 0, 0).interval() is None
