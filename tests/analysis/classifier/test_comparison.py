"""Probes by hand, choices that never see the test texts, transfer, Jaccard, parts of the data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.utils.estimator_checks import check_estimator

from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer
from qscope_posttrain.analysis.classifier.methods import (
    LabeledTexts,
    MeanDifferenceProbe,
    all_methods,
    choice_of,
    collect_examples,
    methods_named,
    token_counts,
)
from qscope_posttrain.analysis.classifier.report import (
    by_layer,
    draw_rows,
    efficiency,
    jaccard_by_layer,
    make_report,
    measure,
)


def make_examples(count=80, informative=3, seed=0, layers=(1, 4)):
    """Ten features a layer; those numbered from `informative` on in layer 4 betray the class, with noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2 == 0
    features = (generator.random((count, 20)) < 0.1) * generator.random((count, 20))
    hits = labels & (generator.random(count) < 0.9)
    features[hits, 10 + informative] = 1 + generator.random(hits.sum())
    states = generator.normal(size=(count, 8))
    states[:, 5] += 3 * labels
    tokens = token_counts([[int(label), 2, 3] for label in labels], 5)
    inputs = {"features": csr_array(features), "residual": states, "tokens": tokens, "length": np.full((count, 1), 3.0)}
    return LabeledTexts(inputs, dict.fromkeys(layers, 10), dict.fromkeys(layers, 4), labels)


def test_mean_difference_by_hand():
    points = np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 2.0], [6.0, 2.0]])
    probe = MeanDifferenceProbe().fit(points, [0, 0, 1, 1])
    # Means (1, 0) and (5, 2): direction (4, 2), midpoint (3, 1).
    assert probe.coef_.tolist() == [4.0, 2.0]
    assert probe.decision_function(np.array([[3.0, 1.0], [4.0, 1.0]])).tolist() == [0.0, 4.0]


def test_the_probe_is_an_estimator_of_scikit_learn():
    results = check_estimator(MeanDifferenceProbe(), on_fail=None)
    assert not [result["check_name"] for result in results if result["status"] == "failed"]


def test_every_method_runs_and_the_informative_ones_find_it():
    discovery, test = make_examples(120), make_examples(100, seed=1)
    fitted = {method.name: method.fit(discovery, folds=3) for method in all_methods()}
    found = {method.name: measure(method, fitted[method.name], test, 50).values for method in all_methods()}
    f1 = {name: values["f1"] for name, values in found.items()}
    informative = ["OR, layer by top1-diff", "OR, layer by validation", "logistic on top features", "bag of tokens"]
    for name in [*informative, "logistic on all features", "logistic on the residual", "difference of means"]:
        assert f1[name] > 0.85, name
    assert max(f1["random features, OR"], f1["length"], f1["majority class"]) < 0.75
    assert f1["always positive"] == pytest.approx(2 / 3)
    assert choice_of(fitted["OR, layer by top1-diff"]) == "layer 4; 1 features"
    assert choice_of(fitted["logistic on the residual"]).startswith("layer 4; C ")
    assert found["length"]["auroc"] == 0.5


def test_choices_do_not_see_the_test_texts():
    discovery = make_examples()
    (method,) = methods_named(["OR, layer by validation"])
    chosen = [method.fit(discovery, folds=3).feature_ids_.tolist() for _ in range(2)]
    assert chosen[0] == chosen[1] == [3]


def test_layers_on_their_own():
    rows = by_layer(make_examples(), make_examples(seed=1), counts=(1, 2))
    assert [(row.layer, row.k) for row in rows] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    assert max(rows, key=lambda row: row.f1).layer == max(rows, key=lambda row: row.top1_difference).layer == 4


def test_transfer_is_good_where_the_same_feature_tells():
    groups = {"a": make_examples(seed=1), "b": make_examples(seed=2), "c": make_examples(informative=7, seed=3)}
    tests = {"a": make_examples(seed=4), "b": make_examples(seed=6), "c": make_examples(informative=7, seed=5)}
    report = make_report(methods_named(["OR, layer by top1-diff"]), groups, tests, folds=2, resamples=20, draws=0)
    found = report.evaluations["OR, layer by top1-diff"]
    f1 = {(one, two): e.values["f1"] for one, row in found.items() for two, e in row.items()}
    assert min(f1["a", "a"], f1["b", "a"], f1["c", "c"]) > 0.85
    assert max(f1["a", "c"], f1["c", "a"]) < 0.6


def test_jaccard_by_hand():
    # Top 2 of layer 1 are {0, 1} for a and {1, 2} for b: 1 of 3 in common.
    one = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]], float)
    two = np.array([[0, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]], float)
    labels = np.array([True, True, False, False])
    columns = {1: 3}
    groups = {
        name: LabeledTexts({"features": csr_array(matrix)}, columns, columns, labels)
        for name, matrix in (("a", one), ("b", two))
    }
    assert jaccard_by_layer(groups, top=2) == {1: {"a/b": pytest.approx(1 / 3)}}


def test_parts_keep_both_classes_and_more_data_do_not_hurt():
    labels = np.array([True] * 30 + [False] * 90)
    rows = draw_rows(labels, 0.1, seed=0)
    assert (sum(labels[rows]), len(rows)) == (3, 12)
    assert draw_rows(labels, 1.0, 0) == list(range(120))
    assert len(draw_rows(labels, 0.001, 0)) == 2
    with pytest.raises(ValueError, match="share in"):
        draw_rows(labels, 0.0, 0)
    methods = methods_named(["OR, layer by top1-diff", "difference of means"])
    found = efficiency(
        methods, make_examples(200), make_examples(200, seed=1), fractions=(0.01, 0.2, 1.0), draws=3, folds=2
    )
    for curve in found.values():
        assert [len(values) for values in curve.values()] == [3, 3, 1]
        assert np.mean(curve[1.0]) > 0.85
        assert np.mean(curve[0.01]) < np.mean(curve[1.0])


def test_examples_of_texts(make_model, tiny_tokenizer, make_sae, texts):
    featurizer = TextFeaturizer(make_model(), tiny_tokenizer, {1: make_sae(1), 2: make_sae(2)})
    lines = [*texts["en"], *texts["fr"]]
    found = collect_examples(featurizer, lines, [True] * 4 + [False] * 4)
    assert found.inputs["residual"].shape == (8, 128)
    assert found.inputs["features"].shape == (8, 384)
    for number, line in enumerate(lines):
        ids = tiny_tokenizer(line)["input_ids"]
        assert (
            found.inputs["tokens"].toarray()[number].tolist()
            == np.bincount(ids, minlength=len(tiny_tokenizer)).tolist()
        )
        assert found.inputs["length"][number, 0] == len(ids)
    part = found.take([6, 1])
    assert part.labels.tolist() == [False, True]
    np.testing.assert_array_equal(part.inputs["residual"], found.inputs["residual"][[6, 1]])
