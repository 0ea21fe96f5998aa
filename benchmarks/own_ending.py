"""A multiple-choice test that very small models can take on any text: which of four endings is the item's own?

Every item is cut in the middle. Beside its own second half stand those of three other items of the same benchmark, cut
to the same number of tokens where they are longer; the model chooses the one with the highest mean log-probability a
token, given the first half. Chance is one in four.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

CHOICES = 4
_STEM, _ENDING = 64, 48
_BATCH = 64


@torch.no_grad()
def correct_endings(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seed: int = 0) -> np.ndarray:
    """[items] 1 where the model prefers the item's own ending, else 0. Items and choices do not depend on the model."""
    rows = []
    for stem, endings in questions(texts, seed):
        before = tokenizer(stem)["input_ids"][-_STEM:]
        after = [tokenizer(ending)["input_ids"][:_ENDING] for ending in endings]
        length = max(1, min(map(len, after)))
        rows += [(before, ending[:length]) for ending in after]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]) + len(rows[row][1]))
    scores = torch.empty(len(rows))
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        scores[chosen] = _mean_log_probability(model, [rows[row] for row in chosen])
    return (scores.view(-1, CHOICES).argmax(dim=1) == 0).numpy().astype(np.float64)


def questions(texts: Sequence[str], seed: int) -> Iterator[tuple[str, list[str]]]:
    """(first half, [own second half, three others]) of every item."""
    halves = [_halves(text) for text in texts]
    generator = random.Random(seed)
    for number, (stem, own) in enumerate(halves):
        others = generator.sample([other for other in range(len(halves)) if other != number], CHOICES - 1)
        yield stem, [own, *(halves[other][1] for other in others)]


def _halves(text: str) -> tuple[str, str]:
    """At the space nearest after the middle, or at the middle where no spaces are written."""
    middle = len(text) // 2
    space = text.find(" ", middle)
    cut = space if 0 <= space < 0.75 * len(text) else middle
    return text[:cut], text[cut:]


def _mean_log_probability(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    longest = max(len(before) + len(after) for before, after in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    counted = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (before, after) in enumerate(rows):
        ids[row, : len(before) + len(after)] = torch.tensor(before + after)
        counted[row, max(len(before), 1) : len(before) + len(after)] = True
    # Right padding needs no mask: a causal model never looks to the right.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    counted = counted[:, 1:]
    return -(loss * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
