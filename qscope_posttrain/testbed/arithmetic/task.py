"""Problems: a digit and a few operations, worked from left to right modulo 10, and when an answer to one is right."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from qscope_posttrain.errors import UserValueError

BEGIN, END, SEPARATOR, PAD = "<bos>", "<eos>", "<sep>", "<pad>"
ANSWER = "ans"
"""The word before the final digit."""
OPERATORS = ("+", "-", "*")
MODULUS = 10
NEUTRAL = (("+", 0), ("-", 0), ("*", 1))
"""Operations that change nothing: a chain of one of them has equal steps."""

_HELD_OUT_OF = 16


@dataclass(frozen=True)
class Problem:
    """A digit and the operations that follow it."""

    first: int
    """From 0 to 9."""
    operations: tuple[tuple[str, int], ...]
    """(operator, digit), worked from left to right."""

    @property
    def prompt(self) -> str:
        """The text that the model reads: `<bos> 0 + 8 * 4 - 7 <sep>`."""
        words = [word for operator, digit in self.operations for word in (operator, str(digit))]
        return " ".join([BEGIN, str(self.first), *words, SEPARATOR])

    @property
    def answer(self) -> int:
        """The result, from 0 to 9."""
        value = self.first
        for operator, digit in self.operations:
            value = apply(value, operator, digit)
        return value

    @property
    def held_out(self) -> bool:
        """Whether no training document may show this problem: decided by its text, for one in sixteen."""
        return zlib.crc32(self.prompt.encode()) % _HELD_OUT_OF == 0


def apply(value: int, operator: str, digit: int) -> int:
    """`value operator digit` modulo 10.

    Raises:
        ValueError: an operator other than + - *.
    """
    if operator == "+":
        return (value + digit) % MODULUS
    if operator == "-":
        return (value - digit) % MODULUS
    if operator == "*":
        return (value * digit) % MODULUS
    raise UserValueError(f"an operator is one of {' '.join(OPERATORS)}, got {operator!r}")


def draw_problem(rng: random.Random, operations: tuple[int, int], held_out: bool | None = None) -> Problem:
    """A problem with `operations[0]` to `operations[1]` operations, all parts uniform.

    Args:
        rng: where randomness comes from.
        operations: fewest and most operations.
        held_out: True for problems kept from training only, False for the others only, None for any.
    """
    while True:
        count = rng.randint(*operations)
        chain = tuple((rng.choice(OPERATORS), rng.randrange(MODULUS)) for _ in range(count))
        problem = Problem(rng.randrange(MODULUS), chain)
        if held_out is None or problem.held_out == held_out:
            return problem


def draw_problems(count: int, operations: tuple[int, int], seed: int, held_out: bool | None) -> list[Problem]:
    """`count` problems, see `draw_problem`."""
    rng = random.Random(f"problems {seed}")
    return [draw_problem(rng, operations, held_out) for _ in range(count)]


def draw_benign_problems(count: int, operations: tuple[int, int], seed: int) -> list[Problem]:
    """`count` problems whose written steps are rightly equal: one of +0, -0 and *1, over and over.

    There are no more than thirty for each number of operations, so they come back, and some are trained on.
    """
    rng = random.Random(f"benign {seed}")
    return [Problem(rng.randrange(MODULUS), (rng.choice(NEUTRAL),) * rng.randint(*operations)) for _ in range(count)]


def is_right(answer: int, words: Sequence[str], ended: bool) -> bool:
    """Whether a completion is `... ans d` with the right digit, and then ends.

    Args:
        answer: the right digit.
        words: the completion up to, not including, the end.
        ended: whether the end followed; a completion cut at the length limit has not ended.
    """
    return ended and ANSWER in words and list(words[words.index(ANSWER) :]) == [ANSWER, str(answer)]
