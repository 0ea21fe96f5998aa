"""find_language_features: from SAEs, files and groups of layers to the same FeatureSet."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.testbed.feature_sets import language_feature_set
from qscope_posttrain.features import build as search_module
from qscope_posttrain.features.build import monolinguality
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find import contrast as find_module
from qscope_posttrain.features.find.contrast import find_language_features
from qscope_posttrain.features.layer_features import TENSOR_FIELDS
from qscope_posttrain.report.tables import Table


@pytest.fixture(scope="module")
def found(make_model, tiny_tokenizer, texts, saes):
    return find_language_features(make_model(), tiny_tokenizer, texts, saes, top=2, target="zh", controls=2)


def assert_same(first: FeatureSet, second: FeatureSet, tolerance: float = 0.0) -> None:
    assert list(first.layers) == list(second.layers)
    for layer in first.layers:
        for name in TENSOR_FIELDS:
            ours, theirs = getattr(first.layers[layer], name), getattr(second.layers[layer], name)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_rows_are_the_best_features_of_each_language(found, statistics, saes):
    for layer, rows in found.layers.items():
        nu = monolinguality(statistics.layers[layer].mean_activation)
        assert rows.labels == tuple(language for language in found.languages for _ in range(2))
        for i, language in enumerate(found.languages):
            best = nu[i].topk(2)
            assert rows.feature_ids[2 * i : 2 * i + 2].tolist() == best.indices.tolist()
            assert rows.names[2 * i] == f"{language} #{int(best.indices[0])}"
            torch.testing.assert_close(rows.scores[2 * i : 2 * i + 2], best.values.float())
        torch.testing.assert_close(rows.encoder, saes[layer].W_enc[rows.feature_ids])
        torch.testing.assert_close(rows.decoder, saes[layer].W_dec[rows.feature_ids])
        alpha = statistics.layers[layer].moments(saes[layer].W_enc, saes[layer].b_enc)[0][:, rows.feature_ids]
        torch.testing.assert_close(rows.encoder_mean, alpha.float(), rtol=1e-5, atol=1e-5)


def test_effects_and_causal_table_belong_to_the_target(found, tmp_path):
    for rows in found.layers.values():
        measured = [label for label, effect in zip(rows.labels, rows.effects, strict=True) if not effect.isnan()]
        assert measured == ["zh", "zh"]
    path = tmp_path / "features.safetensors"
    found.save(path)
    table = Table(**FeatureSet.load(path).provenance["causal_check"])
    assert {row[0] for row in table.rows} == {1, 3}
    assert any("random (2)" in str(row[3]) for row in table.rows), "random features are the controls"


def test_without_a_target_nothing_but_the_pass_runs(make_model, tiny_tokenizer, texts, saes, statistics, monkeypatch):
    for name in ("measure_effects", "causal_check"):
        monkeypatch.setattr(find_module, name, lambda *_, **__: pytest.fail("must not run"))
    features = find_language_features(make_model(), tiny_tokenizer, texts, saes)
    assert_same(features, language_feature_set(statistics, saes))
    assert features.provenance["text_fingerprint"] == statistics.text_fingerprint


def test_files_in_groups_give_the_same(make_model, tiny_tokenizer, texts, saes, found, tmp_path):
    for layer, sae in saes.items():
        sae.save(tmp_path / f"layer{layer}.sae.safetensors")
    features = find_language_features(
        make_model(),
        tiny_tokenizer,
        texts,
        dict.fromkeys(saes, tmp_path),
        target="zh",
        controls=2,
        causal_layers=[1],
        saes_at_once=1,
        checkpoint=tmp_path / "pass",
    )
    assert_same(features, found, tolerance=1e-6)
    assert len(features.provenance["saes"]["3"]["sha256"]) == 64
    assert features.provenance["left_out"] == found.provenance["left_out"]
    assert list(found.provenance["left_out"]["norm_outliers"]) == ["1", "3"]
    assert {row[0] for row in features.provenance["causal_check"]["rows"]} == {1}
    assert not list(tmp_path.glob("pass*"))


def test_too_few_random_features_do_not_lose_the_pass(make_model, tiny_tokenizer, texts, make_sae, capfd):
    small = {3: make_sae(3, d_sae=16)}
    features = find_language_features(make_model(), tiny_tokenizer, texts, small, top=1, target="zh", controls=16)
    assert "random directions are the controls" in capfd.readouterr().err
    assert "random direction (16)" in str(features.provenance["causal_check"])


def test_a_random_feature_of_norm_0_does_not_lose_the_pass(
    make_model, tiny_tokenizer, texts, saes, found, capfd, monkeypatch
):
    dictionary = copy.deepcopy(saes[3])
    empty = next(i for i in range(dictionary.d_sae) if i not in found.layers[3].feature_ids)
    dictionary.W_dec[empty] = 0
    monkeypatch.setattr(find_module, "random_features", lambda *_, **__: torch.tensor([empty]))
    features = find_language_features(
        make_model(), tiny_tokenizer, texts, {3: dictionary}, top=1, target="zh", controls=1
    )
    assert "random directions are the controls" in capfd.readouterr().err
    assert "random direction" in str(features.provenance["causal_check"])


def test_errors_come_before_the_pass(make_model, tiny_tokenizer, texts, saes, make_sae, monkeypatch):
    monkeypatch.setattr(search_module, "collect_statistics", lambda *_, **__: pytest.fail("the pass must not start"))

    def find(texts=texts, saes=saes, **options):
        find_language_features(make_model(), tiny_tokenizer, texts, saes, **options)

    for message, arguments in {
        "at least two languages": {"texts": {"en": texts["en"]}},
        "target 'xx' is not among the languages": {"target": "xx"},
        "fr.*script": {"target": "fr"},
        r"causal_layers \[0\] must be among": {"causal_layers": [0]},
        "between 1 and the 192 features of layer 1": {"top": 193},
        "0 to 3": {"saes": {9: make_sae(9)}},
        "No layer given": {"saes": {}},
        "saes_at_once must be at least 1": {"saes_at_once": 0},
        "controls must be at least 1": {"controls": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            find(**arguments)


def test_a_feature_set_of_another_model_is_refused(found, make_model):
    found.check_model(make_model())
    with pytest.raises(ValueError, match="num_hidden_layers 4 in the features, 3 in the model"):
        found.check_model(make_model(num_hidden_layers=3))
    with pytest.raises(ValueError, match="outside the model's layers"):
        replace(found, model={**found.model, "num_hidden_layers": 2})
