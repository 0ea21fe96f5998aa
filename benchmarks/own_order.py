"""A multiple-choice test that very small models can take on any text: which of four word orders is the item's own?

Beside the item stand three versions of it in which two neighboring words are swapped, each somewhere else (characters
where no spaces are written); the model chooses the version of the highest log-probability. All four have the same
words, so that their frequency does not help. Chance is one in four.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

CHOICES = 4
_WORDS, _TOKENS = 30, 96
"""The beginning of an item that is read"""
_BATCH = 64


@torch.no_grad()
def correct_orders(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seed: int = 0) -> np.ndarray:
    """[items] 1 where the model prefers the item's own order, else 0. The versions do not depend on the model."""
    generator = random.Random(seed)
    rows = [tokenizer(version)["input_ids"][:_TOKENS] for text in texts for version in versions(text, generator)]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    scores = torch.empty(len(rows))
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        scores[chosen] = _log_probability(model, [rows[row] for row in chosen])
    return (scores.view(-1, CHOICES).argmax(dim=1) == 0).numpy().astype(np.float64)


def versions(text: str, generator: random.Random) -> list[str]:
    """The beginning of a text, and three times with one pair of different neighbors swapped; places may recur only
    where there are fewer than three."""
    separator = " " if text.count(" ") >= CHOICES else ""
    words = (text.split(" ") if separator else list(text))[:_WORDS]
    places = [place for place in range(len(words) - 1) if words[place].strip() != words[place + 1].strip()]
    if not places:
        raise ValueError(f"no two different neighbors in {text[:40]!r}.")
    chosen = generator.sample(places, min(len(places), CHOICES - 1))
    swapped = [separator.join([*words[:p], words[p + 1], words[p], *words[p + 2 :]]) for p in chosen]
    return [separator.join(words), *(swapped * CHOICES)[: CHOICES - 1]]


def _log_probability(model: Any, rows: Sequence[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    counted = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        counted[row, 1 : len(tokens)] = True
    # Right padding needs no mask: a causal model never looks to the right.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return -(loss * counted[:, 1:]).sum(dim=1)
