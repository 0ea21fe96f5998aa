"""Equations 13, 14, 16 against a hand-computed table and against loops over texts and features."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from qscope_posttrain.analysis.classifier.metrics import (
    best_thresholds,
    best_vote_count,
    firing,
    firing_rates,
    top_features,
)

# Texts 0..2 are positive, 3..6 negative.
ACTIVATIONS = np.array(
    [
        [2.0, 0.0, 5.0],
        [0.5, 0.0, 1.0],
        [0.0, 3.0, 4.0],
        [0.0, 1.0, 2.0],
        [0.4, 0.0, 0.0],
        [0.0, 0.0, 3.0],
        [0.0, 2.0, 0.0],
    ]
)
POSITIVE = np.array([True] * 3 + [False] * 4)


def test_rates_by_hand():
    rates = firing_rates(csr_array(ACTIVATIONS), POSITIVE)
    assert rates.positive == pytest.approx([2 / 3, 1 / 3, 1.0])
    assert rates.negative == pytest.approx([1 / 4, 2 / 4, 2 / 4])
    assert rates.difference == pytest.approx([5 / 12, -1 / 6, 1 / 2])
    assert top_features(rates.difference, 2).tolist() == [2, 0]
    above = firing_rates(csr_array(ACTIVATIONS), POSITIVE, epsilon=0.5)
    assert above.positive == pytest.approx([1 / 3, 1 / 3, 1.0])


def test_thresholds_by_hand():
    rates = best_thresholds(csr_array(ACTIVATIONS), POSITIVE)
    # Feature 0: above 0.4 two of three positive texts, no negative one: halfway between 0.4 and 0.5.
    # Feature 1: above 2 one positive, none negative. Feature 2: above 3 two of three, none; above 0 three, two of four.
    assert rates.threshold == pytest.approx([0.45, 2.5, 3.5])
    assert rates.difference == pytest.approx([2 / 3, 1 / 3, 2 / 3])


def test_ties_go_to_the_lowest_feature_and_k_may_exceed_the_width():
    assert top_features(np.array([0.1, 0.3, 0.3, 0.2]), 3).tolist() == [1, 2, 3]
    assert top_features(np.array([0.1, 0.3]), 5).tolist() == [1, 0]


@st.composite
def labeled(draw):
    texts, features = draw(st.integers(2, 9)), draw(st.integers(1, 5))
    cells = draw(
        st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 2.5]), min_size=texts * features, max_size=texts * features)
    )
    positive = np.zeros(texts, dtype=bool)
    positive[: draw(st.integers(1, texts - 1))] = True
    return np.array(cells, dtype=np.float32).reshape(texts, features), positive[
        np.array(draw(st.permutations(range(texts))))
    ]


@pytest.mark.promise("The classifier passes scikit-learn's own checks, and its rates equal loops")
@settings(max_examples=200, deadline=None)
@given(labeled(), st.sampled_from([0.0, 1.0, 2.2]))
def test_both_measures_against_loops(case, epsilon):
    dense, positive = case
    plain = firing_rates(csr_array(dense), positive, epsilon)
    best = best_thresholds(csr_array(dense), positive, epsilon)
    for feature in range(dense.shape[1]):
        inside = [dense[n, feature] for n in range(len(dense)) if positive[n]]
        outside = [dense[n, feature] for n in range(len(dense)) if not positive[n]]

        def delta(threshold, inside=inside, outside=outside):
            return sum(a > threshold for a in inside) / len(inside) - sum(a > threshold for a in outside) / len(outside)

        assert plain.difference[feature] == pytest.approx(delta(epsilon))
        candidates = [epsilon, *(a for a in {*inside, *outside} if a > epsilon)]
        reached = max(delta(threshold) for threshold in candidates)
        expected = reached if reached > 1e-12 else delta(epsilon)  # never more often on positive texts: left as it is
        assert best.difference[feature] == pytest.approx(expected)
        assert best.difference[feature] == pytest.approx(delta(best.threshold[feature]))
        assert best.threshold[feature] >= epsilon


@settings(max_examples=100, deadline=None)
@given(labeled())
def test_indicators_against_a_loop(case):
    dense, _ = case
    limits = np.arange(dense.shape[1]) * 0.9
    assert firing(csr_array(dense), limits).toarray().tolist() == [
        [float(a > t) for a, t in zip(row, limits, strict=False)] for row in dense
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=12))
def test_votes_against_a_loop(cases):
    votes = np.array([count for count, _ in cases])
    positive = np.array([flag for _, flag in cases])
    if not positive.any():
        positive[0] = True

    def f1(needed):
        hits = sum(v >= needed and p for v, p in zip(votes, positive, strict=False))
        return 2 * hits / (sum(v >= needed for v in votes) + sum(positive))

    found = best_vote_count(votes, positive)
    assert f1(found) == pytest.approx(max(f1(m) for m in range(1, 7)))
    assert all(f1(m) < f1(found) - 1e-12 for m in range(1, found))
