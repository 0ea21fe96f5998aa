"""Statistics of study 6: how well a panel ranks its models on a benchmark, how alike two benchmarks rank them, and
whether a number from features goes with either, beyond what a control explains.

Pairs of benchmarks are not independent: tests permute benchmarks, intervals resample benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.real.panel.items import GROUP
from benchmarks.real.panel.likelihoods import gain, hits, probabilities
from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures
from qscope_posttrain.analysis.benchmarks.performance import partial_correlation, pearson, performance_redundancy
from qscope_posttrain.analysis.benchmarks.redundancy import measure_redundancy

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A coefficient, its bootstrap limits, and its p value."""

    value: float
    low: float
    high: float
    p: float


def margins(scores: dict[str, Any], right: Sequence[int]) -> Array:
    """[items]: the score of the right answer above the mean of the others, in nats; 0 is chance."""
    return np.array(
        [gains[answer] - np.delete(gains, answer).mean() for gains, answer in zip(gain(scores), right, strict=True)]
    )


SCORES: dict[str, Callable[[dict[str, Any], Sequence[int]], Array]] = {
    "accuracy": hits,
    "probability": probabilities,
    "margin": margins,
}
"""Scores of an item, from the likelihoods of its answers"""


def by_group(values: Array) -> Array:
    """Means over the groups of items that share their answers, along the first axis: these are independent."""
    return values.reshape(-1, GROUP, *values.shape[1:]).mean(axis=1)


def ranking_reliability(scores: Array, draws: int = 200, seed: int = 0) -> float:
    """Correlation over models of their scores [items, models] on two halves of the items, raised to the full length by
    Spearman and Brown's formula: 1 where the items leave no doubt about the order, 0 where they say nothing."""
    groups = by_group(scores)
    halves = [_halves(len(groups), np.random.default_rng((seed, draw))) for draw in range(draws)]
    found = np.array([pearson(groups[one].mean(axis=0), groups[two].mean(axis=0)) for one, two in halves])
    known = found[np.isfinite(found)]  # all models may have the same score on half of the items
    return _spearman_brown(float(known.mean())) if len(known) else 0.0


def similarity_reliability(scores: Sequence[Array], draws: int = 100, seed: int = 0) -> float:
    """The same for the similarity of benchmarks: correlation over pairs between the matrices from two halves of the
    items of every benchmark. No other matrix can be expected to correlate with it more than the root of this."""
    found = []
    upper = np.triu_indices(len(scores), 1)
    for draw in range(draws):
        generator = np.random.default_rng((seed, draw))
        sides: tuple[list[Array], list[Array]] = ([], [])
        for groups in map(by_group, scores):
            for side, rows in zip(sides, _halves(len(groups), generator), strict=True):
                side.append(groups[rows].mean(axis=0))
        with np.errstate(invalid="ignore"):  # all models may have the same score on half of a benchmark
            one, two = (np.asarray(np.corrcoef(np.stack(side)))[upper] for side in sides)
        known = np.isfinite(one) & np.isfinite(two)
        found.append(pearson(one[known], two[known]))
    return _spearman_brown(float(np.nanmean(found)))


def _halves(count: int, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = generator.permutation(count)
    return order[: count // 2], order[count // 2 : count // 2 * 2]


def _spearman_brown(r: float) -> float:
    return 2 * r / (1 + r) if r > 0 else r


def leave_two_out(scores: Array) -> Array:
    """[B, B] similarity of benchmarks given the mean of all OTHER benchmarks, from scores [models, B] (Eq. 12)."""
    count = scores.shape[1]
    standard = (scores - scores.mean(axis=0)) / scores.std(axis=0)
    found = np.eye(count)
    for one in range(count):
        for two in range(one):
            rest = np.delete(standard, [one, two], axis=1).mean(axis=1)
            x, y = standard[:, one], standard[:, two]
            found[one, two] = found[two, one] = partial_correlation(pearson(x, y), pearson(x, rest), pearson(y, rest))
    return found


def given_pairs(x: Array, y: Array, control: Array, permutations: int = 2000, resamples: int = 1000,
                seed: int = 0) -> Estimate:  # fmt: skip
    """Partial correlation over pairs of benchmarks of the matrices x and y given a third one: p by permuting the
    benchmarks of y (partial Mantel test), limits by bootstrap over benchmarks."""
    count = len(x)
    rows, columns = np.triu_indices(count, 1)

    def partial(order: NDArray[np.int64], at: tuple[Any, Any]) -> float:
        sides = x[at], y[np.ix_(order, order)][at], control[at]
        return float(partial_correlation(pearson(*sides[:2]), pearson(sides[0], sides[2]), pearson(sides[1], sides[2])))

    same, generator = np.arange(count), np.random.default_rng(seed)
    value = partial(same, (rows, columns))
    orders = (generator.permutation(count) for _ in range(permutations))
    as_far = sum(abs(partial(order, (rows, columns))) >= abs(value) - 1e-12 for order in orders)
    drawn = []
    for draw in generator.integers(count, size=(resamples, count)):
        apart = draw[rows] != draw[columns]
        drawn.append(partial(same, (draw[rows][apart], draw[columns][apart])))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high), (as_far + 1) / (permutations + 1))


def overlap_min(benchmarks: Sequence[ItemFeatures]) -> Array:
    """[B, B] features that two benchmarks share, as a share of the smaller set (equation 11 of the report)."""
    fires = np.stack([one.counts > 0 for one in benchmarks]).astype(np.float64)
    return fires @ fires.T / np.minimum.outer(fires.sum(axis=1), fires.sum(axis=1))


def cosines(means: Array) -> Array:
    """[B, B] cosine of the mean residual streams [B, d], after the mean over benchmarks is taken off."""
    centered = means - means.mean(axis=0)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    return centered @ centered.T


def random_sizes(
    features: Sequence[ItemFeatures], scores: Mapping[str, Array], smallest: int = 8, draws: int = 30, seed: int = 0
) -> dict[str, list[float]]:
    """Spearman's correlations over benchmarks, `draws` of each, after every benchmark was cut to a size drawn at random
    between `smallest` and its own: R and R-hat both grow with the size, and so agree for that reason alone."""
    found: dict[str, list[float]] = {"R-hat and R": [], "number of items and R": [], "number of items and R-hat": []}
    most = min(map(len, features)) // GROUP
    for draw in range(draws):
        generator = np.random.default_rng((seed, draw))
        sizes = np.geomspace(smallest / GROUP, most, len(features)).round().astype(int) * GROUP
        r, r_hat = [], []
        generator.shuffle(sizes)
        for one, size in zip(features, sizes, strict=True):
            groups = generator.permutation(len(one) // GROUP)[: size // GROUP]
            rows = (groups[:, None] * GROUP + np.arange(GROUP)).ravel()
            cut = scores[one.name][rows]
            flat = np.ptp(cut.mean(axis=0)) == 0
            r.append(math.nan if flat else performance_redundancy(one.name, cut, repeats=3, seed=draw).r)
            r_hat.append(measure_redundancy(one.select(rows), repeats=0).r_hat.estimate)
        known = np.isfinite(r)
        for name, (a, b) in zip(found, ((r_hat, r), (sizes, r), (sizes, r_hat)), strict=True):
            found[name].append(float(spearmanr(np.array(a)[known], np.array(b)[known]).statistic))
    return found
