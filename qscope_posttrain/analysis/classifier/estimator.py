"""`FeatureClassifier`: classify texts by a few SAE features, chosen by how much more often they fire on one class."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from scipy.sparse import csr_array, hstack
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from qscope_posttrain.analysis.classifier import classifier_file
from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer, are_texts, check_widths, layer_slice, stack
from qscope_posttrain.analysis.classifier.metrics import (
    Booleans,
    Floats,
    Integers,
    Rates,
    best_thresholds,
    best_vote_count,
    firing,
    firing_rates,
    top_features,
)
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.tables import Table

Rule = Literal["or", "votes", "logistic"]
Thresholds = Literal["zero", "best"]
Selection = Literal["difference", "random"]


class BinaryClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of scikit-learn by the sign of its `decision_function`; positive is `classes_[1]`."""

    def predict(self, X: Any) -> Any:
        """[texts] the class of each text."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(np.int64)]

    def _positive(self, y: Any) -> Booleans:
        """Whether each label is the positive one; ValueError unless there are two, in the words that scikit-learn's own
        checks look for."""
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            kind = "1 class" if len(self.classes_) == 1 else f"{len(self.classes_)} classes"
            raise UserValueError(f"Only binary classification is supported: y must have two classes, got {kind}.")
        return codes == 1

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class FeatureClassifier(BinaryClassifier):
    """A binary classifier of texts by the firing of a few SAE features (Qwen-Scope report, section 5).

    Every feature gets Delta = P(it fires | positive) - P(it fires | negative) on the training texts (equations 13 and
    14); the positive class is `classes_[1]`, the larger label, as everywhere in scikit-learn. The `n_layers` layers
    with the largest top Delta are taken (equation 16 for one layer, "top1-diff"; equation 17 for several), and in each
    the `k` features with the largest Delta. The rule then decides:

    - "or": positive if any of them fires (equation 15);
    - "votes": positive if at least m fire, where m has the best F1 on the training texts (the least such m);
    - "logistic": logistic regression on the indicators of firing.

    All are `indicators @ weights_ + intercept_ > 0`, and that sum is `decision_function`: for "or" and "votes" the
    number of votes less a constant.

    X, here as in every method, is one of:

    - {layer: TextFeatures, or a matrix [texts, features]};
    - a matrix, dense or sparse, with the layers side by side as `layer_widths` says, for scikit-learn's searches and
      pipelines (`featurizer.stack` and `TextFeaturizer.transform` make it);
    - texts (strings or `TokenText`s), if there is a `featurizer`.

    Attributes after `fit`, S rows: `feature_layers_`, `feature_ids_`, `differences_`, `positive_rates_`,
    `negative_rates_`, `thresholds_`, `weights_` [S]; `intercept_`, `top1_differences_` {layer: largest Delta} of the
    layers that were searched, `layer_widths_`, `featurizer_`.

    Args:
        k: Number of features per layer.
        layer: The layer to use, instead of choosing by top1-diff.
        n_layers: Number of layers to use; with k=1 equation 17.
        thresholds: "zero": a feature fires above `epsilon`; "best": above the activation that maximizes its Delta.
        epsilon: The epsilon of equation 13.
        selection: "difference", or "random", a control: features drawn from those that fire on any training text.
        layer_widths: {layer: columns} of a matrix; None: it is one layer, called 0.
        C: Inverse strength of the L2 penalty of "logistic".
        random_state: Seed of the random selection.
        featurizer: Turns texts into features; needed for texts only.
    """

    def __init__(
        self,
        k: int = 1,
        *,
        rule: Rule = "or",
        layer: int | None = None,
        n_layers: int = 1,
        thresholds: Thresholds = "zero",
        epsilon: float = 0.0,
        selection: Selection = "difference",
        layer_widths: Mapping[int, int] | None = None,
        C: float = 1.0,
        random_state: Any = None,
        featurizer: TextFeaturizer | None = None,
    ) -> None:
        self.k = k
        self.rule = rule
        self.layer = layer
        self.n_layers = n_layers
        self.thresholds = thresholds
        self.epsilon = epsilon
        self.selection = selection
        self.layer_widths = layer_widths
        self.C = C
        self.random_state = random_state
        self.featurizer = featurizer

    def fit(self, X: Any, y: Any) -> FeatureClassifier:
        """Choose layers and features, and learn the weights of the rule."""
        self._check_parameters()
        matrix, y = self._training_matrix(X, y)
        positive = self._positive(y)
        activations = self._choose(matrix, positive)
        self.weights_, self.intercept_ = self._learn(self._indicators(activations), positive)
        return self

    def decision_function(self, X: Any) -> Floats:
        """[texts] `indicators @ weights_ + intercept_`; above 0 is the positive class."""
        check_is_fitted(self)
        return self._indicators(self._chosen_columns(X)) @ self.weights_ + self.intercept_

    @available_if(lambda classifier: classifier.rule == "logistic")
    def predict_proba(self, X: Any) -> Floats:
        """[texts, 2] probabilities in the order of `classes_`; with rule="logistic" only."""
        # 1 / (1 + exp(-x)), without overflow
        positive = np.exp(-np.logaddexp(0.0, -self.decision_function(X)))
        return np.column_stack([1.0 - positive, positive])

    def adopt(self, featurizer: TextFeaturizer) -> None:
        """Classify texts by this featurizer from now on: the one whose features the classifier was fitted on."""
        self.featurizer_: TextFeaturizer | None = featurizer
        self.settings_: dict[str, Any] | None = featurizer.settings()
        self.origin_: dict[str, Any] | None = featurizer.origin()

    def to_table(self) -> Table:
        """One row per chosen feature."""
        check_is_fitted(self)
        columns = (
            self.feature_layers_, self.feature_ids_, self.positive_rates_, self.negative_rates_, self.differences_,
            self.thresholds_, self.weights_,
        )  # fmt: skip
        return Table(
            f"Features that decide between {self.classes_[1]} and {self.classes_[0]}",
            ["layer", "feature", "fires on positive", "on negative", "difference", "threshold", "weight"],
            [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)],
            f"Shares of the training texts. Positive where the weights of the features that fire add up to more than "
            f"{-self.intercept_:.4g}.",
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with JSON metadata, atomically; no pickle, a few kilobytes."""
        check_is_fitted(self)
        document = {
            "parameters": {name: _plain(getattr(self, name)) for name in classifier_file.PARAMETERS},
            "classes": self.classes_.tolist(),
            "intercept": float(self.intercept_),
            "layer_widths": {str(layer): width for layer, width in self.layer_widths_.items()},
            "top1_differences": {str(layer): value for layer, value in self.top1_differences_.items()},
            "settings": self.settings_,
            "origin": self.origin_,
        }
        tensors = {name: getattr(self, name) for name in classifier_file.TENSORS}
        return classifier_file.write_classifier_file(path, document, tensors)

    @classmethod
    def load(cls, path: str | Path, featurizer: TextFeaturizer | None = None) -> FeatureClassifier:
        """Read a file written by `save`. The model and SAEs of a `featurizer`, to classify texts, must be those of the
        training; it takes over the settings and median norms stored in the file."""
        path = Path(path)
        document, tensors = classifier_file.read_classifier_file(path)
        found = cls(**document["parameters"])
        try:
            found._check_parameters()
        except (TypeError, ValueError) as error:
            raise UserValueError(f"{path}: {error}") from error
        for name, tensor in tensors.items():
            setattr(found, name, tensor)
        found.classes_ = np.array(document["classes"])
        found.intercept_ = float(document["intercept"])
        found.layer_widths = found.layer_widths_ = check_widths(document["layer_widths"])
        found.n_features_in_ = sum(found.layer_widths_.values())
        found.top1_differences_ = document["top1_differences"]
        found.origin_, found.settings_, found.featurizer_ = document["origin"], document["settings"], None
        if featurizer is not None:
            used = set(found.feature_layers_.tolist())
            classifier_file.check_origin(path, found.origin_, featurizer.origin(), used)
            found.adopt(featurizer.with_settings(found.settings_ or {}))
            found.featurizer = found.featurizer_
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # a few indicators cannot separate arbitrary real-valued blobs
        tags.input_tags.sparse = True
        return tags

    def _check_parameters(self) -> None:
        for name, kinds in (("rule", Rule), ("thresholds", Thresholds), ("selection", Selection)):
            if getattr(self, name) not in get_args(kinds):
                allowed = ", ".join(repr(kind) for kind in get_args(kinds))
                raise UserValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("k", "n_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise UserValueError(f"{name} must be a whole number from 1 on, got {value!r}.")
        for name, least in (("epsilon", 0.0), ("C", np.nextafter(0.0, 1.0))):
            value = getattr(self, name)
            if not isinstance(value, Real) or not least <= float(value) < np.inf:
                raise UserValueError(f"{name} must be a number from {least:g} on, got {value!r}.")
        if self.layer is not None and self.n_layers != 1:
            raise UserValueError(f"layer={self.layer!r} names one layer, n_layers={self.n_layers} asks for several.")

    def _training_matrix(self, X: Any, y: Any) -> tuple[csr_array, Any]:
        """Check X and y, and keep what prediction needs."""
        self.featurizer_ = self.settings_ = self.origin_ = None
        if are_texts(X):
            if self.featurizer is None:
                raise UserValueError("X holds texts; give the classifier a featurizer, or pass their features.")
            X = self.featurizer.features(list(X))
            self.adopt(self.featurizer.with_norms(X))
        matrix, widths = stack(X) if isinstance(X, Mapping) else (X, self.layer_widths)
        matrix, y = validate_data(self, matrix, y, accept_sparse="csr", dtype=np.float64)
        check_classification_targets(y)
        self.layer_widths_ = check_widths(widths or {0: matrix.shape[1]})
        width = sum(self.layer_widths_.values())
        if width != matrix.shape[1]:
            raise UserValueError(f"X has {matrix.shape[1]} columns, but layer_widths adds up to {width}.")
        return csr_array(matrix), y

    def _chosen_columns(self, X: Any) -> csr_array:
        """[texts, S] the activations of the chosen features; of texts, only the layers that hold them are read."""
        used = list(dict.fromkeys(self.feature_layers_.tolist()))
        if are_texts(X):
            if self.featurizer_ is None:
                raise UserValueError("X holds texts, but this classifier was not fitted or loaded with a featurizer.")
            X = self.featurizer_.features(list(X), layers=used)
        if isinstance(X, Mapping):
            matrix, widths = stack({layer: X[layer] for layer in used if layer in X})
            expected = {layer: self.layer_widths_[layer] for layer in sorted(used)}
            if widths != expected:
                raise UserValueError(
                    f"The classifier needs the features of layers {expected} (layer: width), X has {widths}."
                )
            check_array(matrix, accept_sparse="csr")
        else:
            matrix = csr_array(validate_data(self, X, reset=False, accept_sparse="csr", dtype=np.float64))
            widths = self.layer_widths_
        starts = np.array([layer_slice(widths, layer).start for layer in self.feature_layers_.tolist()])
        return csr_array(matrix[:, starts + self.feature_ids_])

    def _choose(self, matrix: csr_array, positive: Booleans) -> csr_array:
        """Set the attributes of the chosen features, layer by layer, best first; return their columns [texts, S]."""
        widths = self.layer_widths_
        searched = tuple(widths) if self.layer is None else (self.layer,)
        if self.n_layers > len(searched):
            raise UserValueError(f"n_layers={self.n_layers} exceeds the {len(searched)} layers of X.")
        measure = best_thresholds if self.thresholds == "best" else firing_rates
        parts = {layer: csr_array(matrix[:, layer_slice(widths, layer)]) for layer in searched}
        rates = {layer: measure(part, positive, self.epsilon) for layer, part in parts.items()}
        self.top1_differences_ = {layer: float(found.difference.max()) for layer, found in rates.items()}
        ranked = sorted(searched, key=lambda layer: (-self.top1_differences_[layer], layer))[: self.n_layers]
        generator = check_random_state(self.random_state)
        picked = {layer: self._pick(rates[layer], generator) for layer in ranked}
        self.feature_layers_: Integers = np.repeat(np.array(ranked, dtype=np.int64), [len(p) for p in picked.values()])
        self.feature_ids_: Integers = np.concatenate(list(picked.values()))
        if not len(self.feature_ids_):
            raise UserValueError("No feature fires on any training text, so there is nothing to draw from.")
        kept = Rates(*(np.concatenate([rates[n][field][picked[n]] for n in ranked]) for field in range(3)))
        self.positive_rates_, self.negative_rates_, self.thresholds_ = kept
        self.differences_ = kept.difference
        return csr_array(hstack([parts[layer][:, picked[layer]] for layer in ranked], format="csr"))

    def _pick(self, rates: Rates, generator: Any) -> Integers:
        """Ids of the chosen features of one layer."""
        if self.selection == "random":
            return generator.permutation(np.flatnonzero(rates.positive + rates.negative > 0))[: self.k]
        return top_features(rates.difference, self.k)

    def _indicators(self, activations: csr_array) -> Floats:
        """[texts, S] ones where a chosen feature fires."""
        return firing(csr_array(activations), self.thresholds_).toarray()

    def _learn(self, indicators: Floats, positive: Booleans) -> tuple[Floats, float]:
        ones = np.ones(indicators.shape[1])
        if self.rule == "logistic":
            model = LogisticRegression(C=self.C, max_iter=1000).fit(indicators, positive)
            return model.coef_[0], float(model.intercept_[0])
        if self.rule == "votes":
            return ones, 0.5 - best_vote_count(indicators.sum(axis=1).astype(np.int64), positive)
        return ones, -0.5


def _plain(value: Any) -> Any:
    """A numpy scalar as a Python number; a generator of random numbers is not written."""
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, str | int | float) else None
