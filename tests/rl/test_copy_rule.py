"""Copied negatives: pieces of text said again, against a simulation with plain lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope_posttrain.rl.rollouts.copying import SHORTEST_PIECE, CopyRule, boundary_tokens, seeded_text

VOCABULARY = 7
BOUNDARIES = {0, 1}


def simulate(wishes, start, copies, piece_length):
    """What a row says that would say `wishes` if it were free."""
    said, piece, loop, repeated = [], [], None, 0
    for wish in wishes:
        if loop is not None and (repeated < copies * len(loop)):
            said.append(loop[repeated % len(loop)])
            repeated += 1
            continue
        said.append(wish)
        if loop is not None:
            continue
        piece.append(wish)
        if (wish in BOUNDARIES and len(piece) >= SHORTEST_PIECE) or len(piece) >= piece_length:
            if len(said) >= start:
                loop = piece
            piece = []
    return said


def speak(rule, wishes):
    """[rows][steps] tokens that rows say under `rule`; free rows say what they wish, and their logits are untouched."""
    said = [[] for _ in wishes]
    generator = torch.Generator().manual_seed(0)
    for step in range(len(wishes[0])):
        logits = torch.randn(len(wishes), VOCABULARY, generator=generator)
        ruled = rule(step, logits)
        tokens = []
        for row, values in enumerate(ruled):
            if torch.equal(values, logits[row]):
                tokens.append(wishes[row][step])
            else:
                assert int(values.isfinite().sum()) == 1
                assert float(values.max()) == 0.0
                tokens.append(int(values.argmax()))
            said[row].append(tokens[-1])
        rule.read(torch.tensor(tokens))
    return said


def make_rule(starts, copies, piece_length):
    is_boundary = torch.zeros(VOCABULARY, dtype=torch.bool)
    is_boundary[list(BOUNDARIES)] = True
    return CopyRule(is_boundary, torch.tensor(starts), copies, piece_length)


@settings(deadline=None)
@given(data=st.data())
def test_rows_say_what_a_simulation_says(data):
    rows = data.draw(st.integers(1, 3))
    steps = data.draw(st.integers(1, 40))
    copies = data.draw(st.sampled_from([1, 2, 3, 100]))
    piece_length = data.draw(st.integers(1, 9))
    starts = data.draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows))
    wish = st.lists(st.integers(0, VOCABULARY - 1), min_size=steps, max_size=steps)
    wishes = data.draw(st.lists(wish, min_size=rows, max_size=rows))
    said = speak(make_rule(starts, copies, piece_length), wishes)
    assert said == [simulate(wish, start, copies, piece_length) for wish, start in zip(wishes, starts, strict=True)]


@settings(deadline=None)
@given(
    own=st.lists(st.integers(0, VOCABULARY - 1), min_size=30, max_size=30),
    start=st.integers(0, 20),
    copies=st.integers(1, 3),
    piece_length=st.integers(1, 9),
)
def test_text_for_engines_without_a_rule(own, start, copies, piece_length):
    """Its own text and copies, as the rule makes them; from the next token on the row is free in both."""
    is_boundary = make_rule([0], 1, 1)._is_boundary
    text = seeded_text(own[: start + piece_length], is_boundary, start, copies, piece_length)
    assert text is not None
    wishes = own + [2] * (copies * piece_length)
    assert simulate(wishes, start, copies, piece_length)[: len(text)] == text
    assert seeded_text(own[: max(start - 1, 0)], is_boundary, start, copies, piece_length) is None


def test_longer_than_the_room_made_at_first():
    wishes = [[2 + (i * i) % 5 for i in range(600)], [2 + (i // 3) % 5 for i in range(600)]]
    starts = [500, 100]
    assert speak(make_rule(starts, 100, 30), wishes) == [
        simulate(wish, start, 100, 30) for wish, start in zip(wishes, starts, strict=True)
    ]
    assert speak(make_rule(starts, 2, 30), wishes)[0][-30:] == wishes[0][-30:], "after the copies the row goes on"


def test_a_short_piece_runs_on_to_the_next_boundary():
    wishes = [3, 0, 4, 5, 0, 6, 6, 6, 6, 6]
    assert simulate(wishes, 0, 1, 9) == [3, 0, 4, 5, 0, 3, 0, 4, 5, 0]
    assert speak(make_rule([0], 1, 9), [wishes]) == [[3, 0, 4, 5, 0, 3, 0, 4, 5, 0]]


def test_boundary_tokens(tiny_tokenizer):
    marks = [".", "!", "\n", "。"]
    is_boundary = boundary_tokens(tiny_tokenizer, marks, 520)
    assert is_boundary.shape == (520,)
    assert not bool(is_boundary[512:].any()), "rows of the embedding without a token"
    for text, expected in ((".", True), ("!", True), ("\n", True), (",", False), ("a", False), (" ", False)):
        (token,) = tiny_tokenizer(text).input_ids
        assert bool(is_boundary[token]) is expected, text
    ends = tiny_tokenizer("我们在市场上买了面包。").input_ids[-1]
    assert "。" not in tiny_tokenizer.decode([ends]) or bool(is_boundary[ends])
    found = [tiny_tokenizer.decode([token]) for token in is_boundary.nonzero().flatten()]
    assert all(text.strip().endswith((".", "!", "。")) or "\n" in text for text in found)


@pytest.mark.parametrize("marks", [[], ["☃"]])
def test_no_boundary_at_all(tiny_tokenizer, marks):
    assert not bool(boundary_tokens(tiny_tokenizer, marks, 512).any())
