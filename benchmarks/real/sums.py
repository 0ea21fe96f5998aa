"""Prompts of the study of negatives: sums in words that a small chat model half knows, and open prompts."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real.texts import items, paragraphs
from qscope_posttrain.report.summary import write_rows

OPERATIONS = {"plus": "+", "minus": "-", "times": "*"}
ASKS = (
    "Write a short story that begins with: {}",
    "Explain in detail what this means: {}",
    "List ten sentences that are similar to this one: {}",
    "Continue this text: {}",
)
PARTS = ("finding", "held-out")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def open_prompts(part: str, problems: int, instructions: int) -> list[str]:
    """Word problems and instructions on paragraphs of documentation, none of which the SAEs have read; those for
    finding features apart from those to measure on."""
    which = PARTS.index(part)
    texts = [text for text in dict.fromkeys(paragraphs("en", held_out=True)) if len(text) <= 160]
    asked = [ASKS[number % len(ASKS)].format(text) for number, text in enumerate(texts[which::2][:instructions])]
    return [item["question"] for item in items("gsm8k_test")[1::2][which::2][:problems]] + asked


def sums(held_out: bool) -> list[dict[str, Any]]:
    """Sums in words as chats, with their answers: a fifth of all are held out, the others to train on."""
    found = []
    for word, sign in OPERATIONS.items():
        for first in range(2, 21):
            for second in range(2, 10):
                if sign == "-" and second > first:
                    continue
                question = f"What is {first} {word} {second}?"
                answer = {"+": first + second, "-": first - second, "*": first * second}[sign]
                found.append({"prompt": chat(question), "answer": answer})
    random.Random("sums").shuffle(found)
    return [row for number, row in enumerate(found) if (number % 5 == 0) == held_out]


def chat(question: str) -> list[dict[str, str]]:
    """The messages of a question that wants a short answer."""
    return [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": question}]


def is_right(response: str, answer: float) -> bool:
    """Whether the last number of a response is the answer."""
    numbers = _NUMBER.findall(response)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == answer


class RightNumber:
    """Reward 1 for a completion whose last number is the answer, else 0. `answer` is the column of the data."""

    __name__ = "right_number"

    def __call__(self, completions: Sequence[Any], answer: Sequence[float], **columns: Any) -> list[float]:
        texts = [given if isinstance(given, str) else given[-1]["content"] for given in completions]
        return [float(is_right(text, right)) for text, right in zip(texts, answer, strict=True)]


def write_prompts(folder: Path, sizes: Mapping[str, tuple[int, int]], tests: int) -> None:
    """The prompts of all steps as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        write_rows(folder / f"{part}.jsonl", [{"prompt": prompt} for prompt in open_prompts(part, *sizes[part])])
    train = sums(held_out=False)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "test.jsonl", sums(held_out=True)[:tests])
    found = open_prompts("finding", *sizes["finding"])
    mixed = [prompt for pair in zip(found, train, strict=False) for prompt in ({"prompt": pair[0]}, pair[1])]
    write_rows(folder / "curve.jsonl", [{"prompt": row["prompt"]} for row in mixed])
