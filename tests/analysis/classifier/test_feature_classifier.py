"""The rules against loops, layers by top1-diff, scikit-learn's own checks, texts against their features."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier
from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer, stack

# Texts 0..3 are positive. Layer 2 has three features, layer 5 two.
LAYER_2 = np.array([[1, 0, 0], [1, 0, 2], [0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 2], [0, 0, 0], [0, 0, 0]], float)
LAYER_5 = np.array([[1, 0], [1, 1], [1, 0], [0, 1], [0, 1], [0, 0], [0, 1], [0, 0]], float)
Y = np.array([1, 1, 1, 1, 0, 0, 0, 0])
# Deltas of layer 2: 2/4 - 0 = 0.5, 2/4 - 1/4 = 0.25, 1/4 - 1/4 = 0. Of layer 5: 3/4 - 0 = 0.75, 2/4 - 2/4 = 0.


def fires(matrix, features):
    """Equation 15 in words: whether any of the features fires, one text after the other."""
    return [int(any(row[feature] > 0 for feature in features)) for row in matrix]


def test_top1_diff_takes_the_layer_of_the_largest_difference():
    classifier = FeatureClassifier().fit({2: LAYER_2, 5: LAYER_5}, Y)
    assert classifier.top1_differences_ == {2: 0.5, 5: 0.75}
    assert (classifier.feature_layers_.tolist(), classifier.feature_ids_.tolist()) == ([5], [0])
    assert classifier.predict({2: LAYER_2, 5: LAYER_5}).tolist() == fires(LAYER_5, [0])


def test_or_rule_over_the_top_features_of_a_given_layer():
    classifier = FeatureClassifier(k=2, layer=2).fit({2: LAYER_2, 5: LAYER_5}, Y)
    assert classifier.feature_ids_.tolist() == [0, 1]
    assert classifier.differences_.tolist() == [0.5, 0.25]
    assert classifier.predict({2: LAYER_2}).tolist() == fires(LAYER_2, [0, 1]) == [1, 1, 1, 1, 1, 0, 0, 0]


def test_multi_layer_rule_takes_one_best_feature_of_each():
    classifier = FeatureClassifier(n_layers=2).fit({2: LAYER_2, 5: LAYER_5}, Y)
    assert list(zip(classifier.feature_layers_.tolist(), classifier.feature_ids_.tolist(), strict=False)) == [
        (5, 0),
        (2, 0),
    ]
    either = np.maximum(fires(LAYER_5, [0]), fires(LAYER_2, [0])).tolist()
    assert classifier.predict({2: LAYER_2, 5: LAYER_5}).tolist() == either == [1, 1, 1, 0, 0, 0, 0, 0]


def test_votes_need_as_many_as_serve_the_training_texts_best():
    matrix = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]], float)
    classifier = FeatureClassifier(k=3, rule="votes").fit(matrix, [1, 1, 1, 0, 0, 0])
    # m = 1: precision 3/5, recall 1, F1 0.75; m = 2: F1 1; m = 3: F1 0.5.
    assert classifier.intercept_ == -1.5
    assert classifier.predict(matrix).tolist() == [1, 1, 1, 0, 0, 0]
    assert classifier.decision_function(matrix).tolist() == [1.5, 0.5, 0.5, -0.5, -0.5, -1.5]


def test_logistic_rule_is_logistic_regression_on_the_indicators():
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    matrix = np.maximum(generator.normal(size=(60, 12)), 0)
    y = (matrix[:, 3] + matrix[:, 5] - matrix[:, 7] + generator.normal(size=60) > 0.5).astype(int)
    classifier = FeatureClassifier(k=4, rule="logistic", C=0.3).fit(matrix, y)
    indicators = (matrix[:, classifier.feature_ids_] > 0).astype(float)
    reference = LogisticRegression(C=0.3, max_iter=1000).fit(indicators, y)
    np.testing.assert_allclose(classifier.predict_proba(matrix), reference.predict_proba(indicators), atol=1e-9)
    assert (classifier.predict(matrix) == reference.predict(indicators)).all()
    assert not hasattr(FeatureClassifier(rule="or"), "predict_proba")


def test_best_thresholds_are_used_in_prediction():
    matrix = np.array([[3.0], [2.0], [1.0], [1.0]])
    zero = FeatureClassifier().fit(matrix, [1, 1, 0, 0])
    best = FeatureClassifier(thresholds="best").fit(matrix, [1, 1, 0, 0])
    assert (zero.differences_.tolist(), zero.predict(matrix).tolist()) == ([0.0], [1, 1, 1, 1])
    assert (best.differences_.tolist(), best.predict(matrix).tolist()) == ([1.0], [1, 1, 0, 0])
    assert best.thresholds_.tolist() == [1.5]


def test_random_features_are_drawn_from_those_that_fire():
    matrix = np.zeros((20, 50))
    matrix[:10, [4, 9, 30]] = 1
    y = [1, 0] * 10
    drawn = {
        int(FeatureClassifier(selection="random", random_state=s).fit(matrix, y).feature_ids_[0]) for s in range(30)
    }
    assert drawn == {4, 9, 30}
    again = [
        FeatureClassifier(k=2, selection="random", random_state=7).fit(matrix, y).feature_ids_.tolist() for _ in "ab"
    ]
    assert again[0] == again[1]


def test_one_matrix_with_layer_widths_is_the_same_as_a_mapping():
    matrix, columns = stack({5: LAYER_5, 2: LAYER_2})
    assert list(columns.items()) == [(2, 3), (5, 2)]
    one = FeatureClassifier(n_layers=2, layer_widths={2: 3, 5: 2}).fit(matrix, Y)
    two = FeatureClassifier(n_layers=2).fit({2: LAYER_2, 5: LAYER_5}, Y)
    assert one.feature_layers_.tolist() == two.feature_layers_.tolist()
    assert one.predict(matrix.toarray()).tolist() == two.predict({2: LAYER_2, 5: LAYER_5}).tolist()
    search = GridSearchCV(
        FeatureClassifier(layer_widths={2: 3, 5: 2}), {"layer": [2, 5], "k": [1, 2]}, scoring="f1", cv=2
    )
    assert search.fit(matrix, Y).best_params_["layer"] == 5


@pytest.mark.promise("The classifier passes scikit-learn's own checks, and its rates equal loops")
@pytest.mark.parametrize(("rule", "thresholds"), [("or", "best"), ("votes", "zero"), ("logistic", "zero")])
def test_scikit_learns_own_checks(rule, thresholds):
    # All checks, none marked as expected to fail. The data are dense and real-valued: what is below zero never fires.
    results = check_estimator(FeatureClassifier(rule=rule, thresholds=thresholds), on_fail=None)
    failed = {result["check_name"]: result["exception"] for result in results if result["status"] == "failed"}
    assert not failed
    assert sum(result["status"] == "passed" for result in results) > 40


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"k": 0}, "k must be a whole number from 1 on, got 0"),
        ({"k": True}, "k must be"),
        ({"rule": "xor"}, "rule must be one of 'or', 'votes', 'logistic'"),
        ({"thresholds": "f1"}, "thresholds must be"),
        ({"epsilon": -0.1}, "epsilon must be a number from 0 on"),
        ({"layer": 2, "n_layers": 2}, "names one layer"),
        ({"n_layers": 3}, "exceeds the 2 layers"),
        ({"layer": 3}, "no features of layer 3; there are of 2, 5"),
    ],
)
def test_wrong_parameters_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        FeatureClassifier(**parameters).fit({2: LAYER_2, 5: LAYER_5}, Y)


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="must have two classes, got 3"):
        FeatureClassifier().fit(LAYER_2, [0, 1, 2, 0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="layer_widths adds up to 9"):
        FeatureClassifier(layer_widths={0: 4, 1: 5}).fit(LAYER_2, Y)
    with pytest.raises(ValueError, match="give the classifier a featurizer"):
        FeatureClassifier().fit(["one text", "another"], [0, 1])
    with pytest.raises(ValueError, match="features of the same texts"):
        FeatureClassifier().fit({0: LAYER_2, 1: LAYER_5[:3]}, Y)
    fitted = FeatureClassifier().fit({2: LAYER_2, 5: LAYER_5}, Y)
    with pytest.raises(ValueError, match="needs the features of"):
        fitted.predict({5: LAYER_2})
    with pytest.raises(ValueError, match="fitted or loaded with a featurizer"):
        fitted.predict(["a text"])


@pytest.fixture(scope="module")
def featurizer(make_model, tiny_tokenizer, make_sae):
    return TextFeaturizer(make_model(), tiny_tokenizer, {1: make_sae(1), 3: make_sae(3)}, outlier_factor=1.3)


@pytest.fixture(scope="module")
def lines(texts):
    """(texts, labels): English and French against Russian and Korean."""
    kept = [(line, "latin") for name in ("en", "fr") for line in texts[name]]
    kept += [(line, "other") for name in ("ru", "ko") for line in texts[name]]
    return [line for line, _ in kept], [label for _, label in kept]


def test_texts_and_their_features_are_the_same(featurizer, lines):
    texts, labels = lines
    options = {"k": 2, "n_layers": 2, "rule": "votes"}
    by_text = FeatureClassifier(featurizer=featurizer, **options).fit(texts, labels)
    by_features = FeatureClassifier(**options).fit(featurizer.features(texts), labels)
    assert by_text.feature_ids_.tolist() == by_features.feature_ids_.tolist()
    np.testing.assert_array_equal(by_text.predict(texts), by_features.predict(featurizer.features(texts)))
    # Outliers are found by the norms of the training texts, so that a text's score does not depend on its neighbors.
    alone = np.concatenate([by_text.decision_function([text]) for text in texts])
    np.testing.assert_array_equal(alone, by_text.decision_function(texts))
    assert by_text.classes_.tolist() == ["latin", "other"]


def test_a_pipeline_and_clones_share_the_model(featurizer, lines):
    texts, labels = lines
    pipeline = make_pipeline(clone(featurizer), FeatureClassifier(k=3, layer_widths=featurizer.layer_widths))
    pipeline.fit(texts, labels)
    direct = FeatureClassifier(k=3, featurizer=featurizer).fit(texts, labels)
    np.testing.assert_array_equal(pipeline.decision_function(texts), direct.decision_function(texts))
    copy = clone(direct)
    assert copy.featurizer.model is featurizer.model
    assert copy.get_params()["featurizer__outlier_factor"] == 1.3
    assert not hasattr(copy, "classes_")
