"""Equations 13, 18 to 20 and 23 by hand and by brute force; tables of relevance; comparison at equal size."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from qscope_posttrain.features.explain.explanation import FeatureId
from qscope_posttrain.features.text_features import TextFeatures
from qscope_posttrain.synthesis.coverage import (
    activations,
    coverage,
    coverage_interval,
    coverage_of_subsets,
    firing,
    growth,
    missing_first,
    reached_features,
    read_relevance,
    split_targets,
    target_features,
    write_relevance,
)
from qscope_posttrain.synthesis.report import StrategyTexts, comparison_table


def text_features(dense: list[list[float]]) -> TextFeatures:
    matrix = csr_array(np.array(dense, dtype=np.float32))
    return TextFeatures(matrix, torch.ones(len(dense), dtype=torch.long), torch.zeros(len(dense), dtype=torch.bool))


F = FeatureId


def test_by_hand():
    features = {
        3: text_features([[0, 2.5, 0, 0], [0, 0, 1.0, 0], [0, 0.5, 0, 0]]),
        5: text_features([[0, 0], [0, 4.0], [0, 0]]),
    }
    targets = [F(3, 1), F(3, 3), F(5, 1), F(3, 2)]
    assert activations(features, targets).tolist() == [[2.5, 0, 0, 0], [0, 0, 4.0, 1.0], [0.5, 0, 0, 0]]
    hits = firing(features, targets)
    assert hits.tolist() == [[True, False, False, False], [False, False, True, True], [True, False, False, False]]
    counts = hits.sum(axis=0).tolist()  # 2, 0, 1, 1: c_f of equation 18 is counts > 0
    assert coverage(hits) == 0.75  # equation 23: three of four
    assert growth(hits) == [0.25, 0.75, 0.75]
    assert missing_first(targets, counts, enough=1) == [F(3, 3)]  # T_miss of equation 20
    assert missing_first(targets, counts, enough=2) == [F(3, 3), F(3, 2), F(5, 1)]
    assert coverage(hits[:0]) == 0.0
    assert coverage_interval(hits).estimate == 0.75
    assert reached_features(features[3], 3, 1) == (F(3, 1), F(3, 2))
    assert reached_features(features[3], 3, 2) == (F(3, 1),)


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6))
def test_coverage_is_the_union(rows):
    hits = np.array(rows, dtype=bool)
    brute = sum(any(row[feature] for row in rows) for feature in range(4)) / 4
    assert coverage(hits) == brute
    assert growth(hits)[-1] == brute
    assert growth(hits) == sorted(growth(hits))


def test_coverage_of_subsets_is_that_of_all_subsets():
    generator = np.random.default_rng(1)
    hits = generator.random((7, 9)) < 0.2
    exact = np.mean([coverage(hits[list(subset)]) for subset in itertools.combinations(range(7), 3)])
    found = coverage_of_subsets(hits, 3, draws=4000)
    assert found.estimate == pytest.approx(exact, abs=0.01)
    assert found.low <= found.estimate <= found.high
    whole = coverage_of_subsets(hits, 7, draws=3)
    assert whole.low == whole.high == coverage(hits)
    with pytest.raises(ValueError, match="1 to 7"):
        coverage_of_subsets(hits, 8)


def test_targets_by_hand():
    relevance = {F(2, 7): 0.5, F(2, 1): 0.9, F(0, 3): 0.49, F(1, 9): 1.0}
    assert target_features(relevance, 0.5) == (F(1, 9), F(2, 1), F(2, 7))  # equation 19
    with pytest.raises(ValueError, match="highest is 1"):
        target_features({F(1, 9): 1.0}, 1.1)
    with pytest.raises(ValueError, match="lies in"):
        target_features({F(1, 9): 1.5}, 0.5)


def test_split_is_a_partition():
    targets = tuple(F(0, n) for n in range(11))
    for seed, share in itertools.product(range(5), (0.0, 0.3, 0.5, 0.9)):
        made_for, held_out = split_targets(targets, share, seed)
        assert sorted(made_for + held_out) == list(targets)
        assert len(held_out) == round(share * 11)
        assert list(made_for) == sorted(made_for)
    assert split_targets(targets, 0.5, 0) == split_targets(targets, 0.5, 0) != split_targets(targets, 0.5, 1)
    for wrong in (1.0, -0.1, 0.99):
        with pytest.raises(ValueError):
            split_targets(targets, wrong)


def test_layers_and_features_out_of_range_are_refused():
    features = {3: text_features([[0, 1.0]])}
    with pytest.raises(ValueError, match="not read"):
        firing(features, [F(4, 0)])
    with pytest.raises(ValueError, match="0 to 1"):
        firing(features, [F(3, 2)])
    with pytest.raises(ValueError, match="no targets"):
        coverage(np.zeros((3, 0), dtype=bool))


def test_relevance_is_written_and_read(tmp_path):
    draw = random.Random(0)
    relevance = {F(draw.randrange(4), number): draw.random() for number in range(20)}
    assert read_relevance(write_relevance(tmp_path / "relevance.csv", relevance)) == relevance


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,feature\n1,2\n", "columns"),
        ("layer,feature,relevance\n1,2,x\n", "line 2"),
        ("layer,feature,relevance\n1,2,0.5\n1,2,0.6\n", "twice"),
        ("layer,feature,relevance\n1,2,1.5\n", r"\[0, 1\]"),
        ("layer,feature,relevance\n1,2,nan\n", r"\[0, 1\]"),
        ("", "columns"),
    ],
)
def test_tables_of_another_form_are_refused(tmp_path, text, message):
    (tmp_path / "relevance.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_relevance(tmp_path / "relevance.csv")


def test_comparison_at_equal_requests():
    """Verified examples reach every feature of the filter's group."""
    made = np.eye(4, dtype=bool)[[0, 1, 2, 3, 3, 3]]
    none = np.zeros((6, 4), dtype=bool)
    group = {"targets made for": made, "layer 9": made[:, :2]}
    random_corpus = StrategyTexts("random synthesis", {"targets made for": none, "layer 9": none[:, :2]}, 6, 40)
    natural = StrategyTexts(
        "natural text", {"targets made for": np.ones((50, 4), dtype=bool), "layer 9": none[:1, :2].repeat(50, 0)}
    )
    requests = comparison_table(StrategyTexts("feature-driven", group, 6, 70), [0, 1, 2, 3], [random_corpus, natural])
    assert [row[:4] for row in requests.rows] == [
        ("feature-driven, verified", 6, 70, 4),
        ("feature-driven, unfiltered", 6, 70, 6),
        ("random synthesis", 6, 40, 6),
        ("natural text", None, None, 6),
    ]
    assert requests.rows[0][4].startswith("100.0% [")
    assert requests.rows[2][4].startswith("0.0% [")
    assert requests.rows[3][4] == "100.0% (100.0%, 100.0%)"
