"""Detectors of repetition against brute force, TRL's reward, and a count of comparisons."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import get_repetition_penalty_reward

from qscope_posttrain.text.repetition import (
    RepeatedTail,
    compression_ratio,
    is_endless_repetition,
    ngram_repetition_rate,
    repeated_tail,
)

small = st.lists(st.integers(0, 2), max_size=40)


def brute_force(tokens, min_copies, min_tokens):
    """The definition, read aloud: for every period, walk back while elements repeat."""
    n = len(tokens)
    for period in range(1, n + 1):
        start = n - period
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        covered = n - start
        if covered // period >= min_copies and covered >= min_tokens:
            return RepeatedTail(start, period, covered // period)
    return None


@st.composite
def looping(draw):
    """Text, then whole copies of a block, then a part of one: and what of it must be found."""
    head, block = draw(small), draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
    copies, cut = draw(st.integers(2, 8)), draw(st.integers(0, len(block) - 1))
    return head + block * copies + block[:cut], len(head), len(block), copies


@pytest.mark.promise("Repetition detectors equal brute force, and the n-gram rate TRL's reward")
@given(
    tokens=st.one_of(small, looping().map(lambda loop: loop[0])),
    min_copies=st.integers(2, 5),
    min_tokens=st.integers(1, 20),
)
def test_tail_equals_brute_force(tokens, min_copies, min_tokens):
    expected = brute_force(tokens, min_copies, min_tokens)
    assert repeated_tail(tokens, min_copies=min_copies, min_tokens=min_tokens) == expected


@pytest.mark.promise("Repetition detectors equal brute force, and the n-gram rate TRL's reward")
def test_tail_equals_brute_force_on_every_short_binary_sequence():
    for length in range(11):
        for tokens in product("ab", repeat=length):
            text = "".join(tokens)
            for min_copies, min_tokens in ((2, 1), (3, 1), (2, 5)):
                expected = brute_force(text, min_copies, min_tokens)
                assert repeated_tail(text, min_copies=min_copies, min_tokens=min_tokens) == expected, text


@given(looping())
def test_a_planted_loop_is_found(loop):
    """Perhaps with a smaller period, or from further left than it was planted, but never less of it."""
    tokens, start, period, copies = loop
    tail = repeated_tail(tokens, min_copies=copies, min_tokens=1)
    assert tail is not None
    assert tail.period <= period
    if tail.period == period:
        assert tail.start <= start
        assert tail.copies >= copies
    assert all(tokens[i] == tokens[i - tail.period] for i in range(tail.second_copy, len(tokens)))
    assert tail.copies == (len(tokens) - tail.start) // tail.period


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("a", None),
        ("a plain sentence without any loop at all", None),
        ("so: one two one two one two ", RepeatedTail(start=3, period=8, copies=3)),
        ("so: one two one two one two on", RepeatedTail(start=3, period=8, copies=3)),
        ("so: one two one two one two!", None),
        ("one two one two", None),  # two copies
        ("wow!!!", None),  # three elements
        ("a" * 12, RepeatedTail(start=0, period=1, copies=12)),
        ("b" + "a" * 11, None),  # eleven elements
        ("是的，我知道。" * 3, RepeatedTail(start=0, period=7, copies=3)),
    ],
)
def test_tail_of_text(text, expected):
    assert repeated_tail(text) == expected


def test_second_copy():
    tokens = [9, 8, 7] + [1, 2, 3, 4, 5] * 3
    tail = repeated_tail(tokens)
    assert tail == RepeatedTail(start=3, period=5, copies=3)
    assert tail.second_copy == 8


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
def test_kinds_of_sequences(kind):
    tokens = [5, *[1, 2, 3] * 5]
    assert repeated_tail(kind(tokens)) == repeated_tail(tokens) == RepeatedTail(start=1, period=3, copies=5)
    assert ngram_repetition_rate(kind(tokens)) == ngram_repetition_rate(tokens)


class Counted:
    """An element that counts how often it is compared."""

    comparisons = 0

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        Counted.comparisons += 1
        return self.value == other.value

    __hash__ = None


def fibonacci_word(length):
    a, b = "a", "ab"
    while len(b) < length:
        a, b = b, b + a
    return b[:length]


@pytest.mark.parametrize(
    "text",
    [
        "a" * 5000 + "b",
        "b" + "a" * 5000,
        "a" * 2500 + "b" + "a" * 2500,
        ("a" * 70 + "b") * 70,
        fibonacci_word(5000),
        fibonacci_word(5000)[::-1],
        "ab" * 2499 + "aa",
    ],
)
def test_comparisons_grow_with_the_length(text):
    """At most 2 n, also where half of the sequence looks like its other half."""
    sequence = [Counted(character) for character in text]
    Counted.comparisons = 0
    tail = repeated_tail(sequence, min_copies=2, min_tokens=len(text) + 1)  # unsatisfiable: every period is tried
    assert tail is None
    assert Counted.comparisons <= 2 * len(text)


def test_a_very_long_sequence():
    assert repeated_tail("a" * 200_000 + "b") is None
    assert repeated_tail("b" + "a" * 200_000) == RepeatedTail(start=1, period=1, copies=200_000)
    assert repeated_tail([*range(50_000)] * 3) == RepeatedTail(start=0, period=50_000, copies=3)


@pytest.mark.parametrize("settings", [{"min_copies": 1}, {"min_tokens": 0}])
def test_impossible_settings_of_the_tail(settings):
    with pytest.raises(ValueError, match=f"got .*{next(iter(settings))}={next(iter(settings.values()))}"):
        repeated_tail("abc", **settings)


def test_endless_only_if_it_did_not_end():
    loop = [7, 7, *[1, 2, 3] * 4]
    assert is_endless_repetition(loop, ended=False)
    assert not is_endless_repetition(loop, ended=True)
    assert not is_endless_repetition([*loop, 9], ended=False)
    assert not is_endless_repetition(loop, ended=False, min_copies=5)
    assert is_endless_repetition(loop[:-1], ended=False, min_copies=3, min_tokens=11)


@pytest.mark.promise("Repetition detectors equal brute force, and the n-gram rate TRL's reward")
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_ngram_rate_is_trls_reward(tokens, n):
    (reward,) = get_repetition_penalty_reward(ngram_size=n, max_penalty=-1.0)(completion_ids=[tokens])
    assert ngram_repetition_rate(tokens, n) == pytest.approx(-reward, abs=1e-15)


def test_ngram_rate():
    assert ngram_repetition_rate([1, 2, 3, 4, 5]) == 0
    assert ngram_repetition_rate([1, 2]) == 0
    assert ngram_repetition_rate([]) == 0
    assert ngram_repetition_rate([5] * 5, n=2) == 0.75
    assert ngram_repetition_rate(["to", "be", "or", "not", "to", "be"], n=2) == pytest.approx(1 / 5)
    assert ngram_repetition_rate("abab", n=2) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least 1"):
        ngram_repetition_rate([1], n=0)


def test_compression_ratio():
    generator = random.Random(0)
    noise = "".join(chr(generator.randrange(0x4E00, 0x9FFF)) for _ in range(2000))
    assert compression_ratio("") == 1
    assert 0 < compression_ratio("Hi.") < 1
    assert compression_ratio(noise) < 1.5
    assert compression_ratio(noise[:50] * 40) > 10
    assert compression_ratio("one and two and " * 100) > 20
    assert compression_ratio("\ud83d" * 3) > 0  # half an emoji, as a cut byte sequence may leave it
