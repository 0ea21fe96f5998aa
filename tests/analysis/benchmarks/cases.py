"""Small benchmarks, and the formulas of the report written out over all subsets."""

from __future__ import annotations

import itertools

import numpy as np

from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures

WIDTH = 40


def draw(name: str, items: int, seed: int, rates=None, width: int = WIDTH) -> ItemFeatures:
    """Items that fire each feature independently with its rate."""
    generator = np.random.default_rng(seed)
    chance = generator.gamma(0.4, 0.3, width).clip(0.02, 0.9) if rates is None else rates
    return ItemFeatures.from_sets(name, [np.flatnonzero(generator.random(width) < chance) for _ in range(items)], width)


def sets_of(features: ItemFeatures) -> list[set[int]]:
    return [set(features.item(number).tolist()) for number in range(len(features))]


def union(sets) -> set[int]:
    return set().union(*sets)


def mean_union(sets, size: int) -> float:
    """E |F(S)| over all subsets of a size, one by one."""
    return float(np.mean([len(union(part)) for part in itertools.combinations(sets, size)]))


def r_hat_by_hand(sets) -> float:
    """Eq. 7 to 9 literally."""
    total = len(union(sets))
    c = [mean_union(sets, size) / total for size in range(1, len(sets) + 1)]
    area = sum(c) / len(sets)
    return area * len(sets) / total
