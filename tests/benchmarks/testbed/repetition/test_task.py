"""The task: problems, written solutions, loops, and what counts as right."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.testbed.repetition.task import (
    NEUTRAL,
    Document,
    DocumentSettings,
    Problem,
    apply,
    draw_benign_problems,
    draw_documents,
    draw_problems,
    finish,
    is_right,
    write_loop,
    write_steps,
)
from qscope_posttrain.text.repetition import repeated_tail

PROBLEMS = st.builds(
    Problem,
    st.integers(0, 9),
    st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 9)), min_size=1, max_size=6).map(tuple),
)


def by_brackets(prompt: str) -> int:
    """The prompt evaluated by Python, with brackets for working from left to right."""
    words = prompt.split()[1:-1]
    expression = words[0]
    for operator, digit in zip(words[1::2], words[2::2], strict=True):
        expression = f"({expression}) {operator} {digit}"
    return int(eval(expression)) % 10


@given(PROBLEMS)
def test_the_answer_is_the_expression_modulo_ten(problem: Problem) -> None:
    assert problem.answer == by_brackets(problem.prompt)


def test_a_prompt_reads_as_in_the_reference() -> None:
    assert Problem(0, (("+", 8), ("*", 4), ("-", 7))).prompt == "<bos> 0 + 8 * 4 - 7 <sep>"


def test_an_unknown_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="operator"):
        apply(1, "/", 2)


@given(PROBLEMS, st.integers(0, 1000))
def test_every_step_of_a_solution_without_noise_is_true_and_starts_from_the_last(problem: Problem, seed: int) -> None:
    steps, result = write_steps(problem, random.Random(seed))
    value = problem.first
    for step, (operator, digit) in zip(steps, problem.operations, strict=True):
        words = [word for word in step if word not in ("take", "so", ",", ";")]
        left, sign, right, _, after = words
        assert (int(left), sign, int(right)) == (value, operator, digit)
        assert int(after) == by_brackets(f"<bos> {left} {sign} {right} <sep>")
        value = int(after)
    assert value == result == problem.answer
    assert {len(step) for step in steps} <= {6, 7, 8}
    assert is_right(problem.answer, finish(steps, result)[:-1], ended=True)


def test_noise_makes_some_steps_wrong() -> None:
    documents = list(islice(draw_documents(DocumentSettings(noise=0.5), "noise"), 300))
    right = sum(is_right(each.problem.answer, each.words[:-1], ended=True) for each in documents)
    # At least three steps, each right with probability .55; and a wrong one can be mended by a later product with 0.
    assert 20 < right < 150


@given(PROBLEMS, st.integers(0, 1000))
def test_a_loop_repeats_one_or_two_steps_to_the_limit(problem: Problem, seed: int) -> None:
    rng = random.Random(seed)
    steps, _ = write_steps(problem, rng)
    words = write_loop(steps, rng, 120)
    assert len(words) == 120
    assert not {"ans", "<eos>"} & set(words)
    tail = repeated_tail(words)
    assert tail is not None
    body = words[tail.start : tail.second_copy]
    # Equal steps may give a shorter period than the one that was drawn.
    assert body.count(";") in (1, 2)
    assert tail.start < sum(map(len, steps))


def test_documents_are_the_same_for_the_same_seed_and_loop_as_often_as_asked() -> None:
    settings = DocumentSettings(loops=0.25)
    documents = list(islice(draw_documents(settings, "a"), 2000))
    again = list(islice(draw_documents(settings, "a"), 2000))
    assert documents == again
    assert documents != list(islice(draw_documents(settings, "b"), 2000))
    loops = [each for each in documents if each.loop]
    assert 420 < len(loops) < 580
    assert all(len(each.words) == 120 for each in loops)
    assert all(each.words[-1] == "<eos>" and len(each.words) <= 5 * 8 + 3 for each in documents if not each.loop)
    periods = [_period(each) for each in loops]
    assert 0.15 < sum(period > 8 for period in periods) / len(periods) < 0.35


def _period(document: Document) -> int:
    tail = repeated_tail(document.words)
    return tail.period if tail else 0


def test_training_never_shows_a_held_out_problem() -> None:
    held_out = draw_problems(300, (3, 5), 1, held_out=True)
    assert all(problem.held_out for problem in held_out)
    assert not any(each.problem.held_out for each in islice(draw_documents(DocumentSettings(), "c"), 1000))
    share = sum(problem.held_out for problem in draw_problems(3000, (3, 5), 2, held_out=None)) / 3000
    assert 0.045 < share < 0.08


def test_benign_problems_have_equal_steps() -> None:
    for problem in draw_benign_problems(200, (3, 5), 0):
        assert set(problem.operations) <= set(NEUTRAL)
        assert len(set(problem.operations)) == 1
        assert 3 <= len(problem.operations) <= 5
        assert problem.answer == problem.first


@pytest.mark.parametrize(
    ("words", "ended", "right"),
    [
        ("7 + 0 = 7 ; ans 7", True, True),
        ("ans 7", True, True),
        ("7 + 0 = 7 ; ans 7", False, False),
        ("7 + 0 = 7 ; ans 8", True, False),
        ("7 + 0 = 7 ; 7", True, False),
        ("ans 7 ;", True, False),
        ("ans 8 ans 7", True, False),
        ("ans", True, False),
        ("", True, False),
    ],
)
def test_right_is_the_right_digit_and_then_the_end(words: str, ended: bool, right: bool) -> None:
    assert is_right(7, words.split(), ended) is right
