"""Numbers of classifiers: how much more often a feature fires on one class of texts, and metrics of decisions.

A feature matrix `[texts, features]` holds each feature's largest activation over the tokens of a text, zero where it
does not fire: `features.text_features.TextFeatures.matrix`. Equations are those of the Qwen-Scope report, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csc_array, csr_array

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

METRICS = ("f1", "precision", "recall", "tpr_at_1", "tpr_at_5", "auroc")
FALSE_POSITIVE_RATES = {"tpr_at_1": 0.01, "tpr_at_5": 0.05}


class Rates(NamedTuple):
    """Firing rates of every feature, each `[features]`."""

    positive: Floats  # Share of the positive texts on which it fires, P(h = 1 | positive)
    negative: Floats  # Share of the negative ones
    threshold: Floats  # Activation above which it counts as firing

    @property
    def difference(self) -> Floats:
        """Delta_f = P(h = 1 | positive) - P(h = 1 | negative), equation 14."""
        return self.positive - self.negative


def firing_rates(matrix: csr_array, positive: Booleans, epsilon: float = 0.0) -> Rates:
    """Equation 13, h = 1[max_t a_t > epsilon], averaged within each class. `matrix` [texts, features] has the largest
    activations; a value that is not stored is 0, and does not fire: epsilon is not below 0."""
    fires = firing(matrix, epsilon)
    inside = fires[positive].sum(axis=0) / positive.sum()
    outside = fires[~positive].sum(axis=0) / (~positive).sum()
    return Rates(inside, outside, np.full(matrix.shape[1], float(epsilon)))


def best_thresholds(matrix: csr_array, positive: Booleans, epsilon: float = 0.0) -> Rates:
    """As `firing_rates`, with the threshold of each feature, at least `epsilon`, that maximizes its Delta.

    Delta_f(theta) = P(a > theta | positive) - P(a > theta | negative); its largest value over theta is the one-sided
    Kolmogorov-Smirnov statistic of the two samples of activations. The threshold lies halfway between the activations
    that it separates; of several equally good ones it is the highest, with which the feature fires least. A feature
    that no threshold makes fire more often on positive texts keeps `epsilon`.
    """
    columns = csc_array(matrix)
    columns.sort_indices()
    stored = columns.data > epsilon
    values = columns.data[stored].astype(np.float64)
    owners = np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))[stored]
    is_positive = positive[columns.indices[stored]]
    order = np.lexsort((-values, owners))
    values, owners, is_positive = values[order], owners[order], is_positive[order]
    starts = np.searchsorted(owners, np.arange(columns.shape[1] + 1))
    inside = _running_within(is_positive, owners, starts) / positive.sum()
    outside = _running_within(~is_positive, owners, starts) / (~positive).sum()
    # After entry i the texts with a >= values[i] fire; a threshold fits there unless the next value is the same.
    following = np.append(values[1:], epsilon)
    following[starts[1:][starts[1:] > starts[:-1]] - 1] = epsilon  # the last entry of a feature: nothing stored below
    fits = values > following
    result = firing_rates(matrix, positive, epsilon)
    difference = np.where(fits, inside - outside, -np.inf)
    best = np.full(columns.shape[1], -np.inf)
    np.maximum.at(best, owners, difference)
    chosen = np.flatnonzero((difference == best[owners]) & (difference > 0))[::-1]
    features = owners[chosen]  # written from the last to the first, so that the first, the highest threshold, stays
    result.positive[features] = inside[chosen]
    result.negative[features] = outside[chosen]
    result.threshold[features] = (values[chosen] + following[chosen]) / 2
    return result


def firing(matrix: csr_array, thresholds: float | Floats) -> csr_array:
    """Indicators h of equation 13 as a sparse matrix of ones; one threshold, or one per feature, not below 0."""
    limits = np.broadcast_to(np.asarray(thresholds, dtype=np.float64), (matrix.shape[1],))
    fires = (matrix.data > limits[matrix.indices]).astype(np.float64)
    found = csr_array((fires, matrix.indices, matrix.indptr), shape=matrix.shape).copy()
    found.eliminate_zeros()
    return found


def top_features(difference: Floats, k: int) -> Integers:
    """The `k` features with the largest difference, best first; of equal ones the lowest id first."""
    return np.argsort(-difference, kind="stable")[:k]


def _running_within(flags: Booleans, owners: Integers, starts: Integers) -> Floats:
    """Running count of the flags, from the first entry of each feature on."""
    total = np.concatenate([[0.0], np.cumsum(flags, dtype=np.float64)])
    return total[1:] - total[starts[owners]]


def best_vote_count(votes: Integers, positive: Booleans) -> int:
    """The m >= 1 for which "positive if votes >= m" has the best F1, the smallest of equally good ones. F1 = 2 TP /
    (predicted positive + positive). `votes` [texts] are counts from 0 on, `positive` [texts]."""
    needed = np.arange(1, max(int(votes.max()), 1) + 1)
    predicted = votes[:, None] >= needed
    true_positives = (predicted & positive[:, None]).sum(axis=0)
    f1 = 2 * true_positives / (predicted.sum(axis=0) + positive.sum())
    return int(needed[f1.argmax()])


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metrics of one classifier on one set of texts."""

    values: Mapping[str, float]  # By name, see METRICS; NaN where not defined: no positive prediction, no scores
    replicates: Mapping[str, Floats]  # [resamples] of each; equal labels give equal resamples: differences are paired

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
    labels: ArrayLike, predicted: ArrayLike, scores: ArrayLike | None = None, *, resamples: int = 1000
) -> Evaluation:
    """Measure predictions, and the ranking by `scores` (larger is more positive) if there are any, all [texts]. Texts
    are resampled within each class, since the author of the set chose the sizes of the classes."""
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


def _resamples(truth: Booleans, count: int) -> Floats:
    """[count, texts] number of times each text is drawn: with replacement, within its class."""
    generator = np.random.default_rng(0)
    weights = np.zeros((count, len(truth)))
    for kind in (truth, ~truth):
        size = int(kind.sum())
        weights[:, kind] = generator.multinomial(size, np.full(size, 1 / size), size=count)
    return weights


def _measure(truth: Booleans, guess: Booleans, scores: Floats | None, weights: Floats) -> dict[str, Floats]:
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
