"""Which target features a data set reaches, and which to go for first (Qwen-Scope, equations 13, 18, 20 and 23)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.explanation import FeatureId
from qscope_posttrain.features.text_features import TextFeatures
from qscope_posttrain.intervals import Interval, wilson

Hits = NDArray[np.bool_]


def firing(features: Mapping[int, TextFeatures], targets: Sequence[FeatureId]) -> Hits:
    """[texts, targets]: h of equation 13, whether a feature fires on any token of a text that counts (eps = 0).

    Args:
        features: `collect_text_features(..., pooling="max")`.

    Raises:
        ValueError: a target of a layer that was not read.
    """
    return activations(features, targets) > 0


def activations(features: Mapping[int, TextFeatures], targets: Sequence[FeatureId]) -> NDArray[np.float32]:
    """[texts, targets]: the largest activation of each feature on each text, 0 where it does not fire."""
    missing = sorted({target.layer for target in targets} - set(features))
    if missing:
        raise UserValueError(f"targets lie in layers {missing}, which were not read; read were {sorted(features)}.")
    count = len(next(iter(features.values()))) if features else 0
    found = np.zeros((count, len(targets)), dtype=np.float32)
    for layer, read in features.items():
        places = [place for place, target in enumerate(targets) if target.layer == layer]
        if places:
            columns = [targets[place].feature_id for place in places]
            if max(columns) >= read.d_sae:
                raise UserValueError(
                    f"layer {layer} has the features 0 to {read.d_sae - 1}; a target is #{max(columns)}."
                )
            found[:, places] = read.matrix()[:, columns].toarray()
    return found


def target_features(relevance: Mapping[FeatureId, float], tau: float) -> tuple[FeatureId, ...]:
    """T = {(l, f): s_f >= tau} (equation 19), in order of layer and id.

    Raises:
        ValueError: a relevance outside [0, 1], or no feature reaches tau.
    """
    wrong = [f"{feature}: {score}" for feature, score in relevance.items() if not 0 <= score <= 1]
    if wrong:
        raise UserValueError(f"relevance lies in [0, 1]; got {', '.join(wrong[:5])}.")
    found = tuple(sorted(feature for feature, score in relevance.items() if score >= tau))
    if not found:
        highest = max(relevance.values(), default=float("nan"))
        raise UserValueError(f"no feature has a relevance of at least {tau:g}; the highest is {highest:.3g}.")
    return found


def missing_first(targets: Sequence[FeatureId], counts: Sequence[int], enough: int) -> list[FeatureId]:
    """The targets to generate for: those that no seed example fires (T_miss, equation 20), then the weakly covered.

    Args:
        counts: seed examples that fire each target; c_f of equation 18 is count > 0.
        enough: a target with at least so many is left out; 1 keeps T_miss alone.
    """
    ranked = sorted(zip(counts, targets, strict=True))
    return [target for count, target in ranked if count < enough]


def coverage(hits: Hits) -> float:
    """Cov(D), the share of targets that at least one example of D fires (equation 23). `hits` [texts, targets]."""
    if hits.shape[1] == 0:
        raise UserValueError("coverage of no targets is not defined.")
    return float(hits.any(axis=0).mean()) if len(hits) else 0.0


def coverage_interval(hits: Hits) -> Interval:
    """Coverage with Wilson limits: how far it may carry over to other features of the kind that was measured.

    It takes the features for a random draw, and the examples for given.
    """
    return wilson(int(hits.any(axis=0).sum()) if len(hits) else 0, hits.shape[1])


def coverage_of_subsets(hits: Hits, size: int, draws: int = 200, seed: int = 0) -> Interval:
    """Mean coverage of random subsets of `size` examples, and the range that holds 95 % of them.

    Raises:
        ValueError: there are fewer examples, or no draws.
    """
    if not 0 < size <= len(hits) or draws < 1:
        raise UserValueError(f"expected 1 to {len(hits)} examples and at least one draw; got {size} and {draws}.")
    generator = np.random.default_rng(seed)
    found = [coverage(hits[generator.choice(len(hits), size, replace=False)]) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(np.mean(found)), float(low), float(high))


def growth(hits: Hits) -> list[float]:
    """Coverage after the first, the first two, ... examples."""
    if hits.shape[1] == 0:
        raise UserValueError("coverage of no targets is not defined.")
    return [float(share) for share in np.logical_or.accumulate(hits, axis=0).mean(axis=1)]


def split_targets(
    targets: Sequence[FeatureId], share: float, seed: int = 0
) -> tuple[tuple[FeatureId, ...], tuple[FeatureId, ...]]:
    """(those that data are made for, those held out to measure it), drawn at random, both in the order of `targets`.

    Raises:
        ValueError: a share outside [0, 1), or so few targets that none is left to make data for.
    """
    if not 0 <= share < 1:
        raise UserValueError(f"the share held out must lie in [0, 1); got {share}.")
    held = round(share * len(targets))
    if held >= len(targets):
        raise UserValueError(f"holding out {held} of {len(targets)} targets leaves none to make data for.")
    chosen = np.random.default_rng(seed).permutation(len(targets))[:held].tolist()
    apart = set(chosen)
    kept = tuple(target for place, target in enumerate(targets) if place not in apart)
    return kept, tuple(targets[place] for place in sorted(apart))


def reached_features(features: TextFeatures, layer: int, min_texts: int) -> tuple[FeatureId, ...]:
    """The features of one layer that fire on at least `min_texts` of the texts: targets that nobody chose."""
    counts = np.diff(features.matrix().tocsc().indptr)
    return tuple(FeatureId(layer, int(feature)) for feature in np.flatnonzero(counts >= min_texts))
