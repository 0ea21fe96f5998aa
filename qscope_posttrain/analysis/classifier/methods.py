"""The methods of the comparison: feature classifiers, linear probes, and what a reader needs to see beside them.

Every choice that a method leaves open (layer, number of features, regularisation) is made by cross-validation on the
texts it is fitted on, by F1; of equally good candidates the first, which is the simplest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler

from qscope_posttrain.analysis.classifier.baselines import LayerSlice, MeanDifferenceProbe
from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier
from qscope_posttrain.analysis.classifier.examples import Examples
from qscope_posttrain.errors import UserValueError

COUNTS = (1, 2, 5, 10)
"""K of the report"""
MANY = (5, 10, 20, 50)
PENALTIES = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Method:
    """One way to classify."""

    name: str
    reads: str
    """Key of `Examples.inputs`"""
    build: Callable[[Examples, int], Any]
    """(examples, seed) -> an estimator"""
    grid: Callable[[Examples], Mapping[str, Sequence[Any]]] = field(default=lambda examples: {})
    """Candidates, by parameter"""
    ranks: bool = True
    """Whether its scores rank texts"""

    def fit(self, examples: Examples, *, folds: int = 5, seed: int = 0) -> Any:
        """The estimator with the best candidate, fitted on all of `examples`.

        Where a class has fewer than two texts there is nothing to validate on, and the first candidate is taken.
        """
        estimator, grid = self.build(examples, seed), self.grid(examples)
        smallest = int(min(examples.labels.sum(), (~examples.labels).sum()))
        candidates = int(np.prod([len(values) for values in grid.values()]))
        matrix, labels = examples.inputs[self.reads], examples.labels
        if candidates == 1 or min(folds, smallest) < 2:
            return estimator.set_params(**{name: values[0] for name, values in grid.items()}).fit(matrix, labels)
        splits = StratifiedKFold(min(folds, smallest), shuffle=True, random_state=seed)
        search = GridSearchCV(estimator, dict(grid), scoring="f1", cv=splits, error_score="raise")
        return search.fit(matrix, labels).best_estimator_

    def apply(self, fitted: Any, examples: Examples) -> tuple[Any, Any]:
        """(predictions [N] bool, scores [N] or None)."""
        matrix = examples.inputs[self.reads]
        return fitted.predict(matrix), fitted.decision_function(matrix) if self.ranks else None


def all_methods() -> tuple[Method, ...]:
    """Feature classifiers first, then probes and controls."""
    return (
        Method("OR, layer by top1-diff", "features", _features(), _counts(COUNTS)),
        Method("OR, layer by validation", "features", _features(), _layers_and(COUNTS)),
        Method("OR, one feature a layer", "features", _features(), _layer_counts),
        Method("OR, best thresholds", "features", _features(thresholds="best"), _layers_and(COUNTS)),
        Method("votes", "features", _features(rule="votes"), _layers_and(MANY)),
        Method("logistic on top features", "features", _features(rule="logistic"), _layers_and(MANY)),
        Method(
            "logistic, best thresholds", "features", _features(rule="logistic", thresholds="best"), _layers_and(MANY)
        ),
        Method("random features, OR", "features", _features(selection="random"), _counts(COUNTS)),
        Method("logistic on all features", "features", _probe("features", MaxAbsScaler), _probe_grid("features")),
        Method("logistic on the residual", "residual", _probe("residual", StandardScaler), _probe_grid("residual")),
        Method("difference of means", "residual", _mean_difference, _probe_layers),
        Method("bag of tokens", "tokens", _tokens, lambda examples: {"logisticregression__C": PENALTIES}),
        Method("length", "length", lambda examples, seed: make_pipeline(StandardScaler(), LogisticRegression())),
        Method(
            "majority class", "length", lambda examples, seed: DummyClassifier(strategy="most_frequent"), ranks=False
        ),
        Method(
            "always positive",
            "length",
            lambda examples, seed: DummyClassifier(strategy="constant", constant=True),
            ranks=False,
        ),
    )


def methods_named(names: Sequence[str]) -> tuple[Method, ...]:
    """Some of the methods, in their own order.

    Raises:
        ValueError: no such method.
    """
    known = {method.name: method for method in all_methods()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserValueError(f"unknown methods {unknown}; there are {', '.join(known)}.")
    return tuple(method for name, method in known.items() if name in names)


def choice_of(fitted: Any) -> str:
    """What a fitted method settled on, in words."""
    if isinstance(fitted, FeatureClassifier):
        layers = ", ".join(dict.fromkeys(map(str, fitted.feature_layers_.tolist())))
        return f"layer {layers}; {len(fitted.feature_ids_)} features"
    steps = getattr(fitted, "named_steps", {})
    layer = [f"layer {steps['layerslice'].layer}"] if "layerslice" in steps else []
    model = steps.get("logisticregression")
    return "; ".join([*layer, *([f"C {model.C:g}"] if model is not None else [])])


def _features(**parameters: Any) -> Callable[[Examples, int], FeatureClassifier]:
    def build(examples: Examples, seed: int) -> FeatureClassifier:
        widths = dict(zip(examples.features.layers, examples.features.widths, strict=True))
        return FeatureClassifier(layer_widths=widths, random_state=seed, **parameters)

    return build


def _counts(counts: Sequence[int]) -> Callable[[Examples], Mapping[str, Sequence[Any]]]:
    return lambda examples: {"k": counts}


def _layers_and(counts: Sequence[int]) -> Callable[[Examples], Mapping[str, Sequence[Any]]]:
    return lambda examples: {"k": counts, "layer": examples.features.layers}


def _layer_counts(examples: Examples) -> Mapping[str, Sequence[Any]]:
    return {"n_layers": range(1, min(len(examples.features.layers), 8) + 1)}


def _probe(reads: str, scaler: Callable[[], Any]) -> Callable[[Examples, int], Any]:
    def build(examples: Examples, seed: int) -> Any:
        columns = getattr(examples, reads)
        return make_pipeline(LayerSlice(columns, columns.layers[0]), scaler(), LogisticRegression(max_iter=2000))

    return build


def _probe_grid(reads: str) -> Callable[[Examples], Mapping[str, Sequence[Any]]]:
    return lambda examples: {
        "logisticregression__C": PENALTIES,
        "layerslice__layer": getattr(examples, reads).layers,
    }


def _probe_layers(examples: Examples) -> Mapping[str, Sequence[Any]]:
    return {"layerslice__layer": examples.residual.layers}


def _mean_difference(examples: Examples, seed: int) -> Any:
    return make_pipeline(LayerSlice(examples.residual, examples.residual.layers[0]), MeanDifferenceProbe())


def _tokens(examples: Examples, seed: int) -> Any:
    return make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=2000))
