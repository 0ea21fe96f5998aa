"""How many features a random part of a benchmark fires: exact expectations over all subsets of a size, no sampling.

Let m items of N fire a feature. A uniformly random subset of n items misses it with probability

    q(N, m, n) = C(N - m, n) / C(N, n)

so that E |F(S)| = sum_f 1 - q(N, m_f, n), the rarefaction of ecology (Hurlbert 1971). Over sizes it telescopes:

    sum_{j=0}^{n} q(N, m, j) = (N + 1) / (m + 1) * (1 - C(N - m, n + 1) / C(N + 1, n + 1))
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from qscope_posttrain.errors import UserValueError

Counts = NDArray[np.int64]
"""[features] number of items that fire each feature"""


def presence(counts: ArrayLike, items: int, size: int) -> NDArray[np.float64]:
    """Probability `[features]` that a random subset of `size` of the `items` fires a feature: 1 - q(N, m, n).

    Raises:
        ValueError: a size outside 0..items, or a count above the number of items.
    """
    fired = _checked(counts, items)
    if not 0 <= size <= items:
        raise UserValueError(f"a subset of {items} items has 0 to {items} of them, got {size}.")
    return 1.0 - _choose_ratio(items - fired, size, items, size)


def expected_features(counts: ArrayLike, items: int, sizes: ArrayLike) -> NDArray[np.float64]:
    """E |F(S)| `[sizes]` over all subsets of each size (the numerator of Eq. 7 of the Qwen-Scope report)."""
    spectrum, features = np.unique(_checked(counts, items), return_counts=True)
    return np.array([features @ presence(spectrum, items, int(size)) for size in np.atleast_1d(np.asarray(sizes))])


def presence_over_sizes(counts: ArrayLike, items: int, size: int | None = None) -> NDArray[np.float64]:
    """sum_{n=1}^{size} of `presence(counts, items, n)`, `[features]`; by default over all sizes.

    Over all sizes it is m (N + 1) / (m + 1), since C(N - m, N + 1) = 0.
    """
    fired = _checked(counts, items)
    last = items if size is None else size
    if not 0 <= last <= items:
        raise UserValueError(f"a subset of {items} items has 0 to {items} of them, got {last}.")
    missed = (items + 1) / (fired + 1) * (1.0 - _choose_ratio(items - fired, last + 1, items + 1, last + 1))
    return last + 1 - missed


def _choose_ratio(top: NDArray[np.int64], chosen: int, bottom: int, chosen_below: int) -> NDArray[np.float64]:
    """C(top, chosen) / C(bottom, chosen_below), 0 where top < chosen."""
    possible = top >= chosen
    left = np.where(possible, top - chosen, 0)
    logarithm = gammaln(top + 1.0) - gammaln(left + 1.0) - gammaln(bottom + 1.0) + gammaln(bottom - chosen_below + 1.0)
    return np.where(possible, np.exp(logarithm), 0.0)


def _checked(counts: ArrayLike, items: int) -> NDArray[np.int64]:
    fired = np.asarray(counts, dtype=np.int64)
    if fired.size and (fired.min() < 0 or fired.max() > items):
        raise UserValueError(f"a feature fires on 0 to {items} items, got counts from {fired.min()} to {fired.max()}.")
    return fired
