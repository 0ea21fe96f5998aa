"""Metrics by hand, against scikit-learn and loops; their bootstrap against copies of the texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score, roc_curve

from qscope_posttrain.analysis.classifier.metrics import _measure, evaluate


def test_by_hand():
    # Sorted by score: + + - + - ; predicted positive: the first three.
    found = evaluate([1, 1, 0, 1, 0], [1, 1, 1, 0, 0], [5.0, 4.0, 3.0, 2.0, 1.0]).values
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["tpr_at_1"] == pytest.approx(2 / 3)
    assert found["auroc"] == pytest.approx(5 / 6)


@st.composite
def cases(draw):
    size = draw(st.integers(2, 40))
    labels = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(lambda found: len(set(found)) == 2))
    scores = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=size, max_size=size))
    return np.array(labels), np.array(scores)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(cases())
def test_against_scikit_learn(case):
    labels, scores = case
    found = evaluate(labels, scores > 0, scores, resamples=1).values
    assert found["f1"] == pytest.approx(f1_score(labels, scores > 0, zero_division=0))
    assert found["recall"] == pytest.approx(recall_score(labels, scores > 0))
    if (scores > 0).any():
        assert found["precision"] == pytest.approx(precision_score(labels, scores > 0))
    else:
        assert math.isnan(found["precision"])
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    false_rate, true_rate, _ = roc_curve(labels, scores, drop_intermediate=False)
    for name, limit in (("tpr_at_1", 0.01), ("tpr_at_5", 0.05)):
        assert found[name] == pytest.approx(true_rate[false_rate <= limit + 1e-12].max())


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_weights_are_copies_of_texts(case, seed):
    labels, scores = case
    weights = np.random.default_rng(seed).integers(0, 3, size=len(labels))
    weights[[labels.argmax(), labels.argmin()]] += 1
    once = _measure(labels, scores > 0, scores, weights[None].astype(float))
    copied, ranks = np.repeat(labels, weights), np.repeat(scores, weights)
    expected = _measure(copied, ranks > 0, ranks, np.ones((1, len(copied))))
    for name, values in expected.items():
        np.testing.assert_allclose(once[name], values)


def test_intervals_cover_and_differences_are_paired():
    generator = np.random.default_rng(3)
    labels = np.arange(400) % 2 == 0
    good = labels + generator.normal(size=400)
    one = evaluate(labels, good > 0.5, good)
    two = evaluate(labels, good > 0.5, good)
    low, high = one.interval("f1")[1:]
    assert low < one.values["f1"] < high
    assert 0.04 < high - low < 0.12
    assert one.difference(two, "f1") == (0.0, 0.0, 0.0)
    worse = evaluate(labels, generator.random(400) > 0.5, generator.random(400))
    assert one.difference(worse, "auroc").low > 0


def test_without_scores_there_are_no_ranks():
    found = evaluate([1, 0, 1, 0], [1, 1, 1, 1])
    assert math.isnan(found.values["auroc"])
    assert found.to_dict()["f1"][0] == pytest.approx(2 / 3)
    # Every text counts as positive: no resample within the classes can say otherwise.
    assert found.interval("recall") == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], [1, 0]), "both classes"),
        (([1, 0], [1]), r"must be \[texts\]"),
        (([1, 0], [1, 0], [math.nan, 1.0]), "finite"),
    ],
)
def test_what_cannot_be_measured(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*arguments)
