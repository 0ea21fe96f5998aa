"""How many votes a text needs."""

from __future__ import annotations

import numpy as np

from qscope_posttrain.analysis.classifier.rates import Booleans, Integers


def best_vote_count(votes: Integers, positive: Booleans) -> int:
    """The m >= 1 for which "positive if votes >= m" has the best F1; the least of equally good ones.

    F1 = 2 TP / (predicted positive + positive).

    Args:
        votes: [texts], from 0 on.
        positive: [texts].
    """
    largest = max(int(votes.max()), 1)
    needed = np.arange(1, largest + 1)
    predicted = votes[:, None] >= needed
    true_positives = (predicted & positive[:, None]).sum(axis=0)
    f1 = 2 * true_positives / (predicted.sum(axis=0) + positive.sum())
    return int(needed[f1.argmax()])
