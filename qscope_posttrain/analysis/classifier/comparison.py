"""Every method fitted on discovery texts and measured on test texts; transfer; curves over the amount of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier
from qscope_posttrain.analysis.classifier.examples import Examples
from qscope_posttrain.analysis.classifier.methods import COUNTS, Method, choice_of
from qscope_posttrain.analysis.classifier.metrics import Evaluation, evaluate
from qscope_posttrain.analysis.classifier.rates import firing_rates, top_features
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import progress

JACCARD_TOP = 10
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Fitted:
    """A method that has learned."""

    method: Method
    estimator: Any

    @property
    def choice(self) -> str:
        return choice_of(self.estimator)

    def evaluate(self, examples: Examples, resamples: int = 1000) -> Evaluation:
        """On labelled texts."""
        predicted, scores = self.method.apply(self.estimator, examples)
        return evaluate(examples.labels, predicted, scores, resamples=resamples)


@dataclass(frozen=True)
class LayerRow:
    """One layer and K, fitted on discovery texts without choosing anything, measured on test texts."""

    layer: int
    k: int
    top1_difference: float
    f1: float


def fit_methods(methods: Sequence[Method], discovery: Examples, *, folds: int = 5, seed: int = 0) -> dict[str, Fitted]:
    """Each method fitted on all discovery texts."""
    shown = progress(methods, description="fitting the methods")
    return {method.name: Fitted(method, method.fit(discovery, folds=folds, seed=seed)) for method in shown}


def by_layer(discovery: Examples, test: Examples, counts: Sequence[int] = COUNTS) -> list[LayerRow]:
    """F1 of the OR rule on the test texts for every layer and K: what figure 8 of the report takes the maximum of.

    Its maximum is chosen on the test texts, so it is no estimate of anything that one could have deployed.
    """
    widths = dict(zip(discovery.features.layers, discovery.features.widths, strict=True))
    rows = []
    for layer in discovery.features.layers:
        for k in counts:
            classifier = FeatureClassifier(k, layer=layer, layer_widths=widths)
            classifier.fit(discovery.inputs["features"], discovery.labels)
            predicted = classifier.predict(test.inputs["features"])
            f1 = evaluate(test.labels, predicted, resamples=1).values["f1"]
            rows.append(LayerRow(layer, k, classifier.top1_differences_[layer], f1))
    return rows


def transfer(
    methods: Sequence[Method],
    discovery: Mapping[str, Examples],
    test: Mapping[str, Examples],
    *,
    folds: int = 5,
    resamples: int = 1000,
) -> dict[str, dict[str, dict[str, Evaluation]]]:
    """{method: {group learned on: {group tested on: Evaluation}}} for languages, or any groups of texts."""
    found: dict[str, dict[str, dict[str, Evaluation]]] = {method.name: {} for method in methods}
    for source, examples in discovery.items():
        for name, fitted in fit_methods(methods, examples, folds=folds).items():
            found[name][source] = {group: fitted.evaluate(texts, resamples) for group, texts in test.items()}
    return found


def jaccard_by_layer(
    discovery: Mapping[str, Examples], top: int = JACCARD_TOP
) -> dict[int, dict[tuple[str, str], float]]:
    """Per layer, for each pair of groups, |A and B| / |A or B| of their `top` features by Delta."""
    chosen: dict[int, dict[str, set[int]]] = {}
    for group, examples in discovery.items():
        difference = firing_rates(examples.inputs["features"], examples.labels).difference
        for layer in examples.features.layers:
            part = difference[examples.features.slice(layer)]
            chosen.setdefault(layer, {})[group] = set(top_features(part, top).tolist())
    pairs = [(one, two) for one in discovery for two in discovery if one < two]
    return {
        layer: {(a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs}
        for layer, sets in chosen.items()
    }


def efficiency(
    methods: Sequence[Method],
    discovery: Examples,
    test: Examples,
    *,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 5,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, dict[float, list[float]]]:
    """{method: {fraction: [F1 of each draw]}}: everything, choices included, learned from a part of the texts.

    Parts are drawn within each class, at least one text of each. All of it is one draw.
    """
    found: dict[str, dict[float, list[float]]] = {method.name: {} for method in methods}
    plan = [(share, draw) for share in fractions for draw in range(draws if share < 1 else 1)]
    for share, draw in progress(plan, description="learning from parts of the texts"):
        part = discovery.take(draw_rows(discovery.labels, share, seed + draw))
        for method in methods:
            estimator = method.fit(part, folds=folds, seed=seed + draw)
            value = Fitted(method, estimator).evaluate(test, resamples=1).values["f1"]
            found[method.name].setdefault(share, []).append(value)
    return found


def draw_rows(labels: Any, share: float, seed: int) -> list[int]:
    """Rows of a random part with the same share of both classes, at least one of each; ascending.

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UserValueError(f"a part must be a share in (0, 1], got {share}.")
    generator = np.random.default_rng(seed)
    rows: list[int] = []
    for kind in (False, True):
        places = np.flatnonzero(np.asarray(labels) == kind)
        rows += generator.permutation(places)[: max(1, round(share * len(places)))].tolist()
    return sorted(rows)
