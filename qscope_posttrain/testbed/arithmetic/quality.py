"""Sampled quality: how often a model loops and how often it is right, on ordinary and on benign held-out problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qscope_posttrain.intervals import Interval, wilson
from qscope_posttrain.testbed.arithmetic.language_model import ArithmeticModel
from qscope_posttrain.testbed.arithmetic.sampling import Completion
from qscope_posttrain.testbed.arithmetic.task import Problem, is_right
from qscope_posttrain.testbed.arithmetic.tokenizer import decode_words
from qscope_posttrain.text.repetition import is_endless_repetition


@dataclass(frozen=True)
class Quality:
    """Counts over samples, one a problem."""

    samples: int
    loops: int
    """Samples that repeat without end: cut at the length limit with at least four copies of a period."""
    unended: int
    """Samples cut at the length limit, loops among them."""
    right: int
    """Samples with the right answer."""

    @property
    def loop_rate(self) -> Interval:
        """Share of loops with its Wilson interval."""
        return wilson(self.loops, self.samples)

    @property
    def accuracy(self) -> Interval:
        """Share of right answers with its Wilson interval."""
        return wilson(self.right, self.samples)


def count(language_model: ArithmeticModel, problems: Sequence[Problem], completions: Sequence[Completion]) -> Quality:
    """What became of completions of `problems`."""
    pairs = zip(problems, completions, strict=True)
    return Quality(
        samples=len(completions),
        loops=sum(is_loop(completion) for completion in completions),
        unended=sum(not completion.ended for completion in completions),
        right=sum(is_right_completion(language_model, problem, completion) for problem, completion in pairs),
    )


def is_right_completion(language_model: ArithmeticModel, problem: Problem, completion: Completion) -> bool:
    """Whether a completion ends with the answer to its problem."""
    words = decode_words(language_model.tokenizer, completion.tokens)
    return is_right(problem.answer, words, completion.ended)


def is_loop(completion: Completion) -> bool:
    """Whether a completion repeats without end."""
    return is_endless_repetition(completion.tokens, ended=completion.ended)
