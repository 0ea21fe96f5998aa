"""Methods that the report compares: feature classifiers, linear probes, and controls that read no model.

Every choice that a method leaves open (layer, number of features, regularization) is made by cross-validation on the
texts it is fitted on, by F1; of equally good candidates the first, which is the simplest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler, StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from qscope_posttrain.analysis.classifier.estimator import BinaryClassifier, FeatureClassifier
from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer, layer_slice, stack
from qscope_posttrain.errors import UserValueError

COUNTS = (1, 2, 5, 10)  # K of the report
MANY = (5, 10, 20, 50)
PENALTIES = (0.01, 0.1, 1.0)


@dataclass(frozen=True, eq=False)
class LabeledTexts:
    """N labeled texts, in every form that a method reads."""

    inputs: Mapping[str, Any]
    """"features" csr [N, sum of d_sae] and "residual" [N, layers * d_model] with the layers side by side, "tokens" csr
    [N, vocabulary] counts, "length" [N, 1] tokens"""
    features: Mapping[int, int]  # {layer: width} of `inputs["features"]`
    residual: Mapping[int, int]  # {layer: width} of `inputs["residual"]`
    labels: NDArray[np.bool_]  # [N] whether positive

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> LabeledTexts:
        """Some of the texts, in the given order."""
        index = np.asarray(rows, dtype=np.int64)
        inputs = {name: matrix[index] for name, matrix in self.inputs.items()}
        return LabeledTexts(inputs, self.features, self.residual, self.labels[index])


def collect_examples(featurizer: TextFeaturizer, texts: Sequence[str], labels: Sequence[bool]) -> LabeledTexts:
    """Read labeled texts in one pass: features, mean residual stream, and the tokens themselves."""
    flags = np.asarray(labels, dtype=bool)
    ids = featurizer.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    tokens = token_counts([list(row[: featurizer.max_length]) for row in ids], len(featurizer.tokenizer))
    features = featurizer.features(texts, residual=True)
    matrix, widths = stack(features)
    states = {layer: found.residual.numpy() for layer, found in sorted(features.items())}  # type: ignore[union-attr]
    inputs = {
        "features": matrix,
        "residual": np.concatenate(list(states.values()), axis=1),
        "tokens": tokens,
        "length": np.asarray(tokens.sum(axis=1), dtype=np.float64)[:, None],
    }
    return LabeledTexts(inputs, widths, {layer: state.shape[1] for layer, state in states.items()}, flags)


def token_counts(tokens: Sequence[Sequence[int]], vocabulary: int) -> csr_array:
    """[texts, vocabulary] number of occurrences of each token."""
    owners = np.repeat(np.arange(len(tokens)), [len(row) for row in tokens])
    ids = np.array([token for row in tokens for token in row], dtype=np.int64)
    return csr_array((np.ones(len(ids)), (owners, ids)), shape=(len(tokens), vocabulary))  # which adds up equal places


class MeanDifferenceProbe(BinaryClassifier):
    """Classify by the nearer class mean, along the line through both: w = mean(positive) - mean(negative).
    `decision_function` is (x - midpoint) . w, so that a text halfway between the means scores 0."""

    def fit(self, X: Any, y: Any) -> MeanDifferenceProbe:
        """X [texts, d_model], y two classes, the second in order being the positive one."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        positive = self._positive(y)
        means = [X[~positive].mean(axis=0), X[positive].mean(axis=0)]
        self.coef_ = means[1] - means[0]
        self.intercept_ = -float((means[0] + means[1]) @ self.coef_) / 2
        return self

    def decision_function(self, X: Any) -> Any:
        """[texts], above 0 for the positive class."""
        check_is_fitted(self)
        return validate_data(self, X, reset=False, dtype=np.float64) @ self.coef_ + self.intercept_


def columns_of_layer(X: Any, widths: Mapping[int, int], layer: int) -> Any:
    """The columns of one layer of several side by side."""
    return X[:, layer_slice(widths, layer)]


Grid = Callable[[LabeledTexts], Mapping[str, Sequence[Any]]]  # Candidate values, by parameter


@dataclass(frozen=True)
class Method:
    """One way to classify."""

    name: str
    reads: str  # Key of `LabeledTexts.inputs`
    build: Callable[[LabeledTexts, int], Any]  # (texts, seed) -> an estimator
    grid: Grid = field(default=lambda texts: {})
    ranks: bool = True  # Whether its scores rank texts

    def fit(self, texts: LabeledTexts, *, folds: int = 5, seed: int = 0) -> Any:
        """Fit the estimator with the best candidate on all of `texts`. Where a class has fewer than two texts there is
        nothing to validate on, and the first candidate is taken."""
        estimator, grid = self.build(texts, seed), self.grid(texts)
        smallest = int(min(texts.labels.sum(), (~texts.labels).sum()))
        candidates = int(np.prod([len(values) for values in grid.values()]))
        matrix, labels = texts.inputs[self.reads], texts.labels
        if candidates == 1 or min(folds, smallest) < 2:
            return estimator.set_params(**{name: values[0] for name, values in grid.items()}).fit(matrix, labels)
        splits = StratifiedKFold(min(folds, smallest), shuffle=True, random_state=seed)
        search = GridSearchCV(estimator, dict(grid), scoring="f1", cv=splits, error_score="raise")
        return search.fit(matrix, labels).best_estimator_


def all_methods() -> tuple[Method, ...]:
    """Feature classifiers first, then probes and controls."""

    def features(name: str, grid: Grid, **parameters: Any) -> Method:
        def build(texts: LabeledTexts, seed: int) -> FeatureClassifier:
            return FeatureClassifier(layer_widths=texts.features, random_state=seed, **parameters)

        return Method(name, "features", build, grid)

    def probe(name: str, reads: str, *steps: Callable[[], Any], **grid: Sequence[Any]) -> Method:
        def build(texts: LabeledTexts, seed: int) -> Any:
            return make_pipeline(FunctionTransformer(columns_of_layer), *(step() for step in steps))

        def layers(texts: LabeledTexts) -> Mapping[str, Sequence[Any]]:
            widths: Mapping[int, int] = getattr(texts, reads)
            return {**grid, "functiontransformer__kw_args": [{"widths": widths, "layer": layer} for layer in widths]}

        return Method(name, reads, build, layers)

    def control(name: str, reads: str, *steps: Callable[[], Any], **grid: Sequence[Any]) -> Method:
        return Method(name, reads, lambda texts, seed: make_pipeline(*(s() for s in steps)), lambda texts: grid)

    def constant(name: str, **parameters: Any) -> Method:
        return Method(name, "length", lambda texts, seed: DummyClassifier(**parameters), ranks=False)

    def of_a_layer(counts: Sequence[int]) -> Grid:
        return lambda texts: {"k": counts, "layer": list(texts.features)}

    def layer_counts(texts: LabeledTexts) -> Mapping[str, Sequence[Any]]:
        return {"n_layers": range(1, min(len(texts.features), 8) + 1)}

    def logistic() -> LogisticRegression:
        return LogisticRegression(max_iter=2000)

    c: dict[str, Sequence[float]] = {"logisticregression__C": PENALTIES}
    return (
        features("OR, layer by top1-diff", lambda texts: {"k": COUNTS}),
        features("OR, layer by validation", of_a_layer(COUNTS)),
        features("OR, one feature a layer", layer_counts),
        features("OR, best thresholds", of_a_layer(COUNTS), thresholds="best"),
        features("votes", of_a_layer(MANY), rule="votes"),
        features("logistic on top features", of_a_layer(MANY), rule="logistic"),
        features("logistic, best thresholds", of_a_layer(MANY), rule="logistic", thresholds="best"),
        features("random features, OR", lambda texts: {"k": COUNTS}, selection="random"),
        probe("logistic on all features", "features", MaxAbsScaler, logistic, **c),
        probe("logistic on the residual", "residual", StandardScaler, logistic, **c),
        probe("difference of means", "residual", MeanDifferenceProbe),
        control("bag of tokens", "tokens", MaxAbsScaler, logistic, **c),
        control("length", "length", StandardScaler, LogisticRegression),
        constant("majority class", strategy="most_frequent"),
        constant("always positive", strategy="constant", constant=True),
    )


def methods_named(names: Sequence[str]) -> tuple[Method, ...]:
    """Some of the methods, in their own order. ValueError for a name that does not exist."""
    known = {method.name: method for method in all_methods()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserValueError(f"unknown methods {unknown}; there are {', '.join(known)}.")
    return tuple(method for name, method in known.items() if name in names)


def choice_of(fitted: Any) -> str:
    """The choices of a fitted method, in words."""
    if isinstance(fitted, FeatureClassifier):
        layers = ", ".join(dict.fromkeys(map(str, fitted.feature_layers_.tolist())))
        return f"layer {layers}; {len(fitted.feature_ids_)} features"
    steps = getattr(fitted, "named_steps", {})
    layer = [f"layer {steps['functiontransformer'].kw_args['layer']}"] if "functiontransformer" in steps else []
    model = steps.get("logisticregression")
    return "; ".join([*layer, *([f"C {model.C:g}"] if model is not None else [])])
