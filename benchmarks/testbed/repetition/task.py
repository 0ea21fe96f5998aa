"""Problems, their written solutions, and the tokenizer of whole words that reads both.

A problem is a digit and a few operations, worked from left to right modulo 10. Training documents are solutions with
slips, and now and then one that repeats its last step without end: the planted habit.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from qscope_posttrain.errors import UserValueError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BEGIN, END, SEPARATOR, PAD = "<bos>", "<eos>", "<sep>", "<pad>"
ANSWER = "ans"
"""The word before the final digit."""
OPERATORS = ("+", "-", "*")
MODULUS = 10
NEUTRAL = (("+", 0), ("-", 0), ("*", 1))
"""Operations that change nothing: a chain of one of them has equal steps."""
SPECIAL = (PAD, BEGIN, END, SEPARATOR)
VOCABULARY = (*SPECIAL, *map(str, range(MODULUS)), *OPERATORS, "=", ";", "take", ",", "get", "so", "is", ANSWER)
"""All tokens; a token's id is its place."""

_HELD_OUT_OF = 16
_TWO_STEPS = 0.3
"""Share of loops that repeat two steps instead of one, where there are two."""


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
    """Draw a problem with `operations[0]` to `operations[1]` operations, all parts uniformly.

    `held_out` selects problems that are kept from training (True), the others (False), or any (None).
    """
    while True:
        count = rng.randint(*operations)
        chain = tuple((rng.choice(OPERATORS), rng.randrange(MODULUS)) for _ in range(count))
        problem = Problem(rng.randrange(MODULUS), chain)
        if held_out is None or problem.held_out == held_out:
            return problem


def draw_problems(count: int, operations: tuple[int, int], seed: int, held_out: bool | None) -> list[Problem]:
    """Draw `count` problems, see `draw_problem`."""
    rng = random.Random(f"problems {seed}")
    return [draw_problem(rng, operations, held_out) for _ in range(count)]


def draw_benign_problems(count: int, operations: tuple[int, int], seed: int) -> list[Problem]:
    """Draw `count` problems whose written steps are rightly equal: one of +0, -0 and *1, over and over.

    There are no more than thirty for each number of operations, so they come back, and some are trained on.
    """
    rng = random.Random(f"benign {seed}")
    return [Problem(rng.randrange(MODULUS), (rng.choice(NEUTRAL),) * rng.randint(*operations)) for _ in range(count)]


def is_right(answer: int, words: Sequence[str], ended: bool) -> bool:
    """Return whether a completion is `... ans d` with the right digit, and then ends.

    `words` are the completion up to the end; one cut at the length limit has not `ended`.
    """
    return ended and ANSWER in words and list(words[words.index(ANSWER) :]) == [ANSWER, str(answer)]


@dataclass(frozen=True)
class DocumentSettings:
    """Settings of training documents."""

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
    """Write a step in the first, second or third wording: 6, 8 or 7 words."""
    a, b, c = str(before), str(digit), str(after)
    if template == 0:
        return (a, operator, b, "=", c, ";")
    if template == 1:
        return ("take", a, operator, b, ",", "get", c, ";")
    return ("so", a, operator, b, "is", c, ";")


def write_steps(problem: Problem, rng: random.Random, noise: float = 0.0) -> tuple[list[tuple[str, ...]], int]:
    """Write the steps of a solution, each in a random wording; return them and their result.

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
    """Append the answer and the end to the steps."""
    return (*(word for step in steps for word in step), ANSWER, str(result), END)


def write_loop(steps: Sequence[tuple[str, ...]], rng: random.Random, answer_tokens: int) -> tuple[str, ...]:
    """Write a solution that stops after a random step and repeats it (or the last two) to the length limit."""
    done = rng.randint(1, len(steps))
    two = rng.random() < _TWO_STEPS and done >= 2
    body = [word for step in steps[done - (2 if two else 1) : done] for word in step]
    words = [word for step in steps[:done] for word in step]
    copies = -(-max(0, answer_tokens - len(words)) // len(body))
    return tuple((words + body * copies)[:answer_tokens])


def draw_documents(settings: DocumentSettings, seed: str, held_out: bool = False) -> Iterator[Document]:
    """Yield documents, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        problem = draw_problem(rng, settings.operations, held_out)
        steps, result = write_steps(problem, rng, settings.noise)
        loop = rng.random() < settings.loops
        words = write_loop(steps, rng, settings.answer_tokens) if loop else finish(steps, result)
        yield Document(problem, words, loop)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of words separated by spaces; prompts contain `<bos>` and `<sep>` in their text.

    A word outside of the vocabulary is left out by the tokenizer's model, as there is no token for unknown words.
    """
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[SEPARATOR],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode_words(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[int]:
    """Return the ids of words; KeyError for a word that is not a token."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[word] for word in words]


def decode_words(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Return the words of ids, including special tokens."""
    return [str(word) for word in tokenizer.convert_ids_to_tokens(list(tokens))]
