"""How well a classifier separates labelled texts, with bootstrap intervals over the texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval

METRICS = ("f1", "precision", "recall", "tpr_at_1", "tpr_at_5", "auroc")
FALSE_POSITIVE_RATES = {"tpr_at_1": 0.01, "tpr_at_5": 0.05}

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metrics of one classifier on one set of texts."""

    values: Mapping[str, float]
    """By name, see METRICS; NaN where not defined: precision without a positive prediction, ranks without scores."""
    replicates: Mapping[str, Floats]
    """[resamples] of each; the same seed and labels give the same resamples, so that differences are paired."""
    level: float

    def interval(self, name: str) -> Interval:
        """Percentile interval of one metric."""
        return _interval(self.values[name], self.replicates[name], self.level)

    def difference(self, other: Evaluation, name: str) -> Interval:
        """Paired interval of this one's metric minus the other's, on the same texts with the same seed.

        Raises:
            ValueError: they were not resampled alike.
        """
        if len(self.replicates[name]) != len(other.replicates[name]):
            raise UserValueError("A paired difference needs evaluations with the same resamples.")
        replicates = self.replicates[name] - other.replicates[name]
        return _interval(self.values[name] - other.values[name], replicates, self.level)

    def to_dict(self) -> dict[str, Any]:
        """{metric: [value, low, high]}."""
        return {name: list(self.interval(name)) for name in METRICS}


def evaluate(
    labels: ArrayLike,
    predicted: ArrayLike,
    scores: ArrayLike | None = None,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Measure predictions, and the ranking by `scores` if there are any.

    Texts are resampled within each class, since the sizes of the classes are a choice of whoever made the set.

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
    if resamples < 1 or not 0 < level < 1:
        raise UserValueError(f"resamples must be at least 1 and level within (0, 1); got {resamples}, {level}.")
    once = np.ones((1, len(truth)))
    weights = _resamples(truth, resamples, seed)
    values = {name: float(found[0]) for name, found in _measure(truth, guess, ranks, once).items()}
    return Evaluation(values, _measure(truth, guess, ranks, weights), level)


def _resamples(truth: NDArray[np.bool_], count: int, seed: int) -> Floats:
    """[count, texts] how often each text is drawn: with replacement, within its class."""
    generator = np.random.default_rng(seed)
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
    below = (
        1 - false_rate + outside / negatives[:, None] / 2
    )  # share of the negatives below, those at par counting half
    found["auroc"] = (inside * below).sum(axis=1) / positives
    return found


def _interval(value: float, replicates: Floats, level: float) -> Interval:
    kept = replicates[np.isfinite(replicates)]
    if math.isnan(value) or not len(kept):
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
