"""The test of word order: what it puts beside an item, and whom it credits."""

from __future__ import annotations

import importlib.util
import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

_SPEC = importlib.util.spec_from_file_location(
    "own_order", Path(__file__).resolve().parents[2] / "benchmarks" / "own_order.py"
)
own_order = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(own_order)
CHOICES, correct_orders, versions = own_order.CHOICES, own_order.correct_orders, own_order.versions

TEXTS = ["the old mill stands by the river near town", "she reads a book every single evening at home"]


def swaps(text: str, other: str, separator: str = " ") -> int:
    """Neighbours that changed places; -1 where anything else differs."""
    one, two = text.split(separator) if separator else list(text), other.split(separator) if separator else list(other)
    places = [place for place, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    right = len(places) == 2 and places[1] == places[0] + 1 and one[places[0]] == two[places[1]]
    return places[0] if right else -1


@pytest.mark.parametrize(("text", "separator"), [(TEXTS[0], " "), ("河水流过旧磨坊，流进山谷。", "")])
def test_three_versions_each_with_one_pair_of_neighbours_swapped(text, separator):
    own, *others = versions(text, random.Random(0))
    places = [swaps(own, other, separator) for other in others]
    assert own == text
    assert len(others) == CHOICES - 1
    assert min(places) >= 0
    assert len(set(places)) == len(places)


def test_equal_neighbours_are_never_swapped():
    for seed in range(50):
        own, *others = versions("a a a b c d", random.Random(seed))
        assert own not in others
    with pytest.raises(ValueError, match="no two different neighbors"):
        versions("a a a a a", random.Random(0))


class Bigrams(torch.nn.Module):
    """Gives each pair of tokens its own log-probability."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


def word_tokenizer(texts):
    words = sorted({word for text in texts for word in text.split()})
    return (lambda text: {"input_ids": [words.index(word) for word in text.split()]}), len(words)


def test_a_model_that_knows_the_pairs_of_the_texts_is_always_right():
    tokenizer, size = word_tokenizer(TEXTS)
    table = torch.zeros(size, size)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        for a, b in itertools.pairwise(ids):
            table[a, b] = 5.0
    assert correct_orders(Bigrams(table), tokenizer, TEXTS).tolist() == [1.0, 1.0]
    assert correct_orders(Bigrams(-table), tokenizer, TEXTS).tolist() == [0.0, 0.0]


def test_log_probabilities_equal_those_of_one_text_at_a_time():
    tokenizer, size = word_tokenizer(TEXTS)
    torch.manual_seed(1)
    table = torch.randn(size, size)
    long = [" ".join(text.split()[:length]) for text in TEXTS for length in (5, 7, 8)]
    generator, expected = random.Random(0), []
    for text in long:
        scores = []
        for version in versions(text, generator):
            ids = torch.tensor(tokenizer(version)["input_ids"])
            scores.append(table.log_softmax(dim=1)[ids[:-1], ids[1:]].sum().item())
        expected.append(float(np.argmax(scores) == 0))
    assert correct_orders(Bigrams(table), tokenizer, long).tolist() == expected
