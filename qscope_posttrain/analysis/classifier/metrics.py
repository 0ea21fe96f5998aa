"""Measure classifiers on labeled texts: metrics with bootstrap intervals, layers, top features, amounts of data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier
from qscope_posttrain.analysis.classifier.featurizer import layer_slice
from qscope_posttrain.analysis.classifier.methods import COUNTS, LabeledTexts, Method
from qscope_posttrain.analysis.classifier.rates import firing_rates, top_features
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval
from qscope_posttrain.report.progress import progress

METRICS = ("f1", "precision", "recall", "tpr_at_1", "tpr_at_5", "auroc")
FALSE_POSITIVE_RATES = {"tpr_at_1": 0.01, "tpr_at_5": 0.05}
JACCARD_TOP = 10
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metrics of one classifier on one set of texts."""

    values: Mapping[str, float]
    """By name, see METRICS; NaN where not defined: precision without a positive prediction, ranks without scores."""
    replicates: Mapping[str, Floats]
    """[resamples] of each; the same labels give the same resamples, so that differences are paired."""

    def interval(self, name: str) -> Interval:
        """95 % percentile interval of one metric."""
        return _interval(self.values[name], self.replicates[name])

    def difference(self, other: Evaluation, name: str) -> Interval:
        """Paired interval of this one's metric minus the other's, on the same texts."""
        if len(self.replicates[name]) != len(other.replicates[name]):
            raise UserValueError("A paired difference needs evaluations with the same resamples.")
        replicates = self.replicates[name] - other.replicates[name]
        return _interval(self.values[name] - other.values[name], replicates)

    def to_dict(self) -> dict[str, Any]:
        """{metric: [value, low, high]}."""
        return {name: list(self.interval(name)) for name in METRICS}


def evaluate(
    labels: ArrayLike,
    predicted: ArrayLike,
    scores: ArrayLike | None = None,
    *,
    resamples: int = 1000,
) -> Evaluation:
    """Measure predictions, and the ranking by `scores` if there are any.

    Texts are resampled within each class, since the author of the set chose the sizes of the classes.

    Args:
        labels: [texts] bool, both classes present.
        predicted: [texts] bool.
        scores: [texts], larger is more positive.

    Raises:
        ValueError: other shapes, one class only, scores that are not finite.
    """
    truth, guess = np.asarray(labels, dtype=bool), np.asarray(predicted, dtype=bool)
    ranks = None if scores is None else np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != guess.shape or (ranks is not None and ranks.shape != truth.shape):
        raise UserValueError(f"labels, predictions and scores must be [texts], got {truth.shape} and {guess.shape}.")
    if truth.all() or not truth.any():
        raise UserValueError(
            f"An evaluation needs texts of both classes, got {int(truth.sum())} of {len(truth)} positive."
        )
    if ranks is not None and not np.isfinite(ranks).all():
        raise UserValueError("scores must be finite numbers.")
    if resamples < 1:
        raise UserValueError(f"resamples must be at least 1; got {resamples}.")
    once = np.ones((1, len(truth)))
    values = {name: float(found[0]) for name, found in _measure(truth, guess, ranks, once).items()}
    return Evaluation(values, _measure(truth, guess, ranks, _resamples(truth, resamples)))


def measure(method: Method, fitted: Any, texts: LabeledTexts, resamples: int = 1000) -> Evaluation:
    """Measure a fitted method on labeled texts."""
    matrix = texts.inputs[method.reads]
    scores = fitted.decision_function(matrix) if method.ranks else None
    return evaluate(texts.labels, fitted.predict(matrix), scores, resamples=resamples)


@dataclass(frozen=True)
class LayerRow:
    """One layer and K, fitted on discovery texts without choosing anything, measured on test texts."""

    layer: int
    k: int
    top1_difference: float
    f1: float


def by_layer(discovery: LabeledTexts, test: LabeledTexts, counts: Sequence[int] = COUNTS) -> list[LayerRow]:
    """F1 of the OR rule on the test texts for every layer and K: the cells whose maximum figure 8 of the report shows.

    Their maximum is chosen on the test texts, so it estimates nothing that could have been deployed.
    """
    rows = []
    for layer in discovery.features:
        for k in counts:
            classifier = FeatureClassifier(k, layer=layer, layer_widths=discovery.features)
            classifier.fit(discovery.inputs["features"], discovery.labels)
            predicted = classifier.predict(test.inputs["features"])
            f1 = evaluate(test.labels, predicted, resamples=1).values["f1"]
            rows.append(LayerRow(layer, k, classifier.top1_differences_[layer], f1))
    return rows


def jaccard_by_layer(discovery: Mapping[str, LabeledTexts], top: int = JACCARD_TOP) -> dict[int, dict[str, float]]:
    """Per layer, for each pair of groups "A/B", |A and B| / |A or B| of their `top` features by Delta."""
    chosen: dict[int, dict[str, set[int]]] = {}
    for group, texts in discovery.items():
        difference = firing_rates(texts.inputs["features"], texts.labels).difference
        for layer in texts.features:
            part = difference[layer_slice(texts.features, layer)]
            chosen.setdefault(layer, {})[group] = set(top_features(part, top).tolist())
    pairs = [(one, two) for one in discovery for two in discovery if one < two]
    return {
        layer: {f"{a}/{b}": len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs}
        for layer, sets in chosen.items()
    }


def efficiency(
    methods: Sequence[Method],
    discovery: LabeledTexts,
    test: LabeledTexts,
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
            fitted = method.fit(part, folds=folds, seed=seed + draw)
            found[method.name].setdefault(share, []).append(measure(method, fitted, test, resamples=1).values["f1"])
    return found


def draw_rows(labels: Any, share: float, seed: int) -> list[int]:
    """Draw rows with the same share of both classes, at least one of each; ascending. `share` lies in (0, 1]."""
    if not 0 < share <= 1:
        raise UserValueError(f"a part must be a share in (0, 1], got {share}.")
    generator = np.random.default_rng(seed)
    rows: list[int] = []
    for kind in (False, True):
        places = np.flatnonzero(np.asarray(labels) == kind)
        rows += generator.permutation(places)[: max(1, round(share * len(places)))].tolist()
    return sorted(rows)


def _resamples(truth: NDArray[np.bool_], count: int) -> Floats:
    """[count, texts] number of times each text is drawn: with replacement, within its class."""
    generator = np.random.default_rng(0)
    weights = np.zeros((count, len(truth)))
    for kind in (truth, ~truth):
        size = int(kind.sum())
        weights[:, kind] = generator.multinomial(size, np.full(size, 1 / size), size=count)
    return weights


def _measure(
    truth: NDArray[np.bool_], guess: NDArray[np.bool_], scores: Floats | None, weights: Floats
) -> dict[str, Floats]:
    """Every metric, [resamples], of texts that count `weights` [resamples, texts] times."""
    positives, negatives = weights[:, truth].sum(axis=1), weights[:, ~truth].sum(axis=1)
    hits, alarms = weights[:, guess & truth].sum(axis=1), weights[:, guess & ~truth].sum(axis=1)
    with np.errstate(invalid="ignore"):
        precision = hits / (hits + alarms)
    found = {"f1": 2 * hits / (hits + alarms + positives), "precision": precision, "recall": hits / positives}
    if scores is None:
        return found | dict.fromkeys((*FALSE_POSITIVE_RATES, "auroc"), np.full(len(weights), math.nan))
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=math.inf))  # texts of one score fall on the same side
    inside = np.add.reduceat((weights * truth)[:, order], starts, axis=1)
    outside = np.add.reduceat((weights * ~truth)[:, order], starts, axis=1)
    true_rate = inside.cumsum(axis=1) / positives[:, None]
    false_rate = outside.cumsum(axis=1) / negatives[:, None]
    for name, limit in FALSE_POSITIVE_RATES.items():
        found[name] = np.where(false_rate <= limit + 1e-12, true_rate, 0.0).max(axis=1)
    # share of the negatives below, those with an equal score counting half
    below = 1 - false_rate + outside / negatives[:, None] / 2
    found["auroc"] = (inside * below).sum(axis=1) / positives
    return found


def _interval(value: float, replicates: Floats) -> Interval:
    kept = replicates[np.isfinite(replicates)]
    if math.isnan(value) or not len(kept):
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(kept, [0.025, 0.975])
    return Interval(value, float(low), float(high))
