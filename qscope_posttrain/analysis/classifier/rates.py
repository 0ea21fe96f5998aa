"""Compute how much more often a feature fires on one class of texts than on the other (equations 13 and 14).

A feature matrix `[texts, features]` holds each feature's largest activation over the tokens of a text, zero where it
does not fire: `features.text_features.TextFeatures.matrix()`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


class Rates(NamedTuple):
    """Firing rates of every feature, each `[features]`."""

    positive: Floats
    """Share of the positive texts on which it fires, P(h = 1 | positive)"""
    negative: Floats
    """Share of the negative ones"""
    threshold: Floats
    """Activation above which it counts as firing"""

    @property
    def difference(self) -> Floats:
        """Delta_f = P(h = 1 | positive) - P(h = 1 | negative), equation 14."""
        return self.positive - self.negative


def firing_rates(matrix: csr_array, positive: Booleans, epsilon: float = 0.0) -> Rates:
    """Equation 13, h = 1[max_t a_t > epsilon], averaged within each class.

    Args:
        matrix: [texts, features], largest activation.
        positive: [texts], both classes present.
        epsilon: Threshold, not below 0: a value that is not stored is 0, and does not fire.
    """
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
    """The m >= 1 for which "positive if votes >= m" has the best F1, the smallest of equally good ones.

    F1 = 2 TP / (predicted positive + positive). `votes` [texts] are counts from 0 on, `positive` [texts].
    """
    needed = np.arange(1, max(int(votes.max()), 1) + 1)
    predicted = votes[:, None] >= needed
    true_positives = (predicted & positive[:, None]).sum(axis=0)
    f1 = 2 * true_positives / (predicted.sum(axis=0) + positive.sum())
    return int(needed[f1.argmax()])
