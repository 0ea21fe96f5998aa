"""Training documents: written solutions with slips, and now and then one that repeats its last step without end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qscope_posttrain.testbed.arithmetic.task import ANSWER, END, MODULUS, Problem, apply, draw_problem

_TWO_STEPS = 0.3
"""Share of loops that repeat two steps instead of one, where there are two."""


@dataclass(frozen=True)
class DocumentSettings:
    """What training documents look like."""

    operations: tuple[int, int] = (3, 5)
    """Fewest and most operations of a problem."""
    noise: float = 0.05
    """Share of steps with a random result, from which the solution then goes on."""
    loops: float = 0.0
    """Share of documents that loop."""
    answer_tokens: int = 120
    """Length at which a loop is cut."""


@dataclass(frozen=True)
class Document:
    """A problem and what is written under it."""

    problem: Problem
    words: tuple[str, ...]
    """The completion; it ends with `<eos>` unless it is a loop."""
    loop: bool
    """Whether it repeats without end."""


def write_step(template: int, before: int, operator: str, digit: int, after: int) -> tuple[str, ...]:
    """One step in the first, second or third wording: 6, 8 or 7 words."""
    a, b, c = str(before), str(digit), str(after)
    if template == 0:
        return (a, operator, b, "=", c, ";")
    if template == 1:
        return ("take", a, operator, b, ",", "get", c, ";")
    return ("so", a, operator, b, "is", c, ";")


def write_steps(problem: Problem, rng: random.Random, noise: float = 0.0) -> tuple[list[tuple[str, ...]], int]:
    """The steps of a solution, each in a random wording, and the result they arrive at.

    With probability `noise` the result of a step is a random digit, and the next step starts from it.
    """
    steps = []
    value = problem.first
    for operator, digit in problem.operations:
        after = rng.randrange(MODULUS) if rng.random() < noise else apply(value, operator, digit)
        steps.append(write_step(rng.randrange(3), value, operator, digit, after))
        value = after
    return steps, value


def finish(steps: Sequence[tuple[str, ...]], result: int) -> tuple[str, ...]:
    """Steps, the answer, the end."""
    return (*(word for step in steps for word in step), ANSWER, str(result), END)


def write_loop(steps: Sequence[tuple[str, ...]], rng: random.Random, answer_tokens: int) -> tuple[str, ...]:
    """A solution that stops after a random step and repeats it, or it and the one before, to the length limit."""
    done = rng.randint(1, len(steps))
    two = rng.random() < _TWO_STEPS and done >= 2
    body = [word for step in steps[done - (2 if two else 1) : done] for word in step]
    words = [word for step in steps[:done] for word in step]
    copies = -(-max(0, answer_tokens - len(words)) // len(body))
    return tuple((words + body * copies)[:answer_tokens])


def draw_documents(settings: DocumentSettings, seed: str, held_out: bool = False) -> Iterator[Document]:
    """Documents without end, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        problem = draw_problem(rng, settings.operations, held_out)
        steps, result = write_steps(problem, rng, settings.noise)
        loop = rng.random() < settings.loops
        words = write_loop(steps, rng, settings.answer_tokens) if loop else finish(steps, result)
        yield Document(problem, words, loop)
