"""Which tokens betray a language or register that has no script of its own: a list learnt from counts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError

RATIO = 20.0
"""How many times more frequent in the target than in any other text a token must be."""
_LEAST_COUNT = 5


def distinctive_tokens(tokens: Mapping[str, np.ndarray], target: str, ratio: float = RATIO) -> Tensor:
    """Tokens at least `ratio` times as frequent in the target as in each other text, int64 [n], ascending.

    Frequencies are (count + 1/2) / (tokens + 1/2 per entry); a token needs at least 5 occurrences in the target.

    Args:
        tokens: name -> token ids of its text.
        target: one of the names.
        ratio: least quotient of frequencies.

    Raises:
        ValueError: no other text, or no token that is distinctive.
    """
    others = [name for name in tokens if name != target]
    if target not in tokens or not others:
        raise UserValueError(f"distinctive tokens of {target!r} need its text and another, got {sorted(tokens)}")
    size = 1 + max(int(ids.max()) for ids in tokens.values())
    counts = {name: np.bincount(ids, minlength=size) for name, ids in tokens.items()}
    frequency = {name: (count + 0.5) / (count.sum() + 0.5 * size) for name, count in counts.items()}
    rival = np.max([frequency[name] for name in others], axis=0)
    found = np.flatnonzero((frequency[target] >= ratio * rival) & (counts[target] >= _LEAST_COUNT))
    if not found.size:
        raise UserValueError(f"no token is {ratio:g} times as frequent in {target!r} as in {', '.join(others)}")
    return torch.from_numpy(found).long()
