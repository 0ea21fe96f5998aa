"""Selectors against their formulas, and baseline FeatureSets against explicit statistics."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.testbed.feature_sets import (
    difference_of_means_set,
    direction_feature_set,
    language_feature_set,
    random_feature_set,
)
from qscope_posttrain.features.build import (
    difference_of_means,
    monolinguality,
    random_features,
    top_features,
)


def test_monolinguality_is_the_paper_formula():
    mu = torch.rand(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nu = monolinguality(mu)
    for language in range(4):
        for feature in range(7):
            others = [mu[i, feature] for i in range(4) if i != language]
            assert nu[language, feature] == pytest.approx(float(mu[language, feature] - sum(others) / 3))


def test_monolinguality_needs_two_languages():
    with pytest.raises(ValueError, match="at least two languages"):
        monolinguality(torch.ones(1, 5))


def test_top_features_best_first_ties_by_id():
    assert top_features(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3).tolist() == [1, 3, 2]
    for top in (0, 5):
        with pytest.raises(ValueError, match="between 1 and the 4 features"):
            top_features(torch.ones(4), top)


def test_random_features_are_alive_neutral_and_reproducible():
    firing = torch.tensor([[0.2, 0.0, 0.3, 0.1, 0.2, 0.4], [0.2, 0.004, 0.1, 0.1, 0.2, 0.4]])
    scores = torch.tensor([1.0, 0.0, 0.01, -0.2, -0.04, 0.03])  # 0 too high, 1 dead, 3 too low
    drawn = random_features(firing, scores, 3, seed=1)
    assert sorted(drawn.tolist()) == [2, 4, 5]
    assert torch.equal(drawn, random_features(firing, scores, 3, seed=1))
    for seed in range(8):
        assert sorted(random_features(firing, scores, 2, seed, exclude=[4]).tolist()) == [2, 5]
    with pytest.raises(ValueError, match="Only 3 features"):
        random_features(firing, scores, 4)


def test_difference_of_means_weighs_the_other_languages_alike():
    mean = torch.tensor([[1.0, 0.0], [3.0, 3.0], [5.0, 9.0]])
    assert difference_of_means(mean, 0).tolist() == [-3.0, -6.0]


def test_difference_of_means_set(statistics):
    features = difference_of_means_set(statistics, "zh")
    rows, measured = features.layers[3], statistics.layers[3]
    others = [i for i, name in enumerate(statistics.languages) if name != "zh"]
    expected = measured.mean_residual[2] - measured.mean_residual[others].mean(0)
    torch.testing.assert_close(rows.decoder[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows.encoder, rows.decoder)
    assert rows.encoder_bias.tolist() == [0.0]
    torch.testing.assert_close(rows.encoder_mean, rows.decoder_mean)
    # The score is the squared length of the difference: mean projection on itself, target minus others.
    assert float(rows.scores) == pytest.approx(float(expected @ expected), rel=1e-4)
    assert list(features.layers) == [1, 3]


def test_direction_feature_set(statistics):
    direction = torch.randn(64, generator=torch.Generator().manual_seed(3))
    rows = direction_feature_set(statistics, 1, direction, "probe", language="fr").layers[1]
    mean, covariance = statistics.layers[1].moments(direction[None])
    torch.testing.assert_close(rows.decoder_mean, mean.float())
    torch.testing.assert_close(rows.encoder_covariance, covariance.float())
    assert rows.names == ("probe",)


def test_random_feature_set_matches_norms_and_avoids_the_originals(statistics, saes):
    like = language_feature_set(statistics, saes, top=3).select("zh")
    features = random_feature_set(statistics, saes, like, seed=4)
    for layer, rows in features.layers.items():
        original = like.layers[layer]
        torch.testing.assert_close(rows.decoder.norm(dim=1), original.decoder.norm(dim=1))
        torch.testing.assert_close(rows.encoder.norm(dim=1), original.encoder.norm(dim=1))
        assert not set(rows.feature_ids.tolist()) & set(original.feature_ids.tolist())
        assert rows.labels == original.labels
        trained = saes[layer].select(rows.feature_ids)
        cosine = torch.cosine_similarity(rows.decoder, trained.decoder)
        torch.testing.assert_close(cosine, torch.ones(3))
        scale = rows.encoder.norm(dim=1) / trained.encoder.norm(dim=1)
        torch.testing.assert_close(rows.encoder_bias, trained.encoder_bias * scale)
    again = random_feature_set(statistics, saes, like, seed=5)
    assert again.layers[3].feature_ids.tolist() != features.layers[3].feature_ids.tolist()
    with pytest.raises(ValueError, match="needs the SAE of layer 1"):
        random_feature_set(statistics, {3: saes[3]}, like)


def test_without_second_moments_only_the_covariances_are_missing(make_model, tiny_tokenizer, texts, saes, tmp_path):
    from qscope_posttrain.features.feature_set import FeatureSet
    from qscope_posttrain.features.statistics import collect_statistics

    found = collect_statistics(make_model(), tiny_tokenizer, texts, saes, second_moments=False)
    features = language_feature_set(found, saes)
    features.save(tmp_path / "a")
    rows = FeatureSet.load(tmp_path / "a").layers[1]
    assert rows.encoder_covariance.isnan().all()
    assert math.isfinite(float(rows.encoder_mean[0].sum()))
