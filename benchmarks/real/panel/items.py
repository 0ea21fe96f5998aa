"""Items of real benchmarks as questions with answers to choose from, so that small models can be ranked by them.

Four items of a benchmark share their four answers, and the right one is to be found for each of the four questions.
Whoever does not read the question gives the same answer four times and is right once: chance is exactly a quarter,
whatever answers are likely by themselves. Where a benchmark has options of its own, the right one is the answer, and
the question is read without them.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.real.texts import data_folder, items, lines

ENDING = "\nAnswer:"
GROUP = 4
LANGUAGES = ("en", "fr", "ru", "zh")
MGSM = 250
"""Items of MGSM: translations of the first ones of GSM8K"""
LONGEST, LONGEST_TRANSLATED, LONGEST_ANSWER = 280, 180, 60
"""Characters of a question, of one of MGSM in English, and of an answer; longer items are left out"""
SUBJECTS = (
    ("biology", 144), ("others", 297), ("biology", 310), ("others", 112), ("mathematics", 370), ("computing", 100),
    ("chemistry", 303), ("computing", 100), ("physics", 488), ("statistics", 216), ("mathematics", 478),
    ("computing", 100),
)  # fmt: skip
"""Subjects of mmlu_stem and their numbers of items, in the order of the file; "others" are astronomy, electrical
engineering and machine learning"""
_OPTION = {
    "aqua": re.compile(r"\n([A-E])\)"),
    "gaokao_math_qa": re.compile(r"\n\(([A-D])\)"),
    "sat_math": re.compile(r"[\n ]([A-D])[).]"),
    "mmlu": re.compile(r"\n([A-D])\)"),
}


@dataclass(frozen=True)
class Item:
    """A question with answers to choose from; without any, it is read for its features only."""

    question: str
    unit: str
    """Equal for translations of one question"""
    options: tuple[str, ...] = ()
    right: int = 0
    ending: str = ENDING


def benchmark_sets(count: int = 40, seed: int = 0) -> dict[str, list[Item]]:
    """At most `count` items of each benchmark, drawn from those that no SAE learned from."""
    chosen = {}
    for name, found in {**_with_own_options(), **_without_options()}.items():
        answered = [replace(item, options=(item.options[item.right],), right=0) for item in found]
        chosen[name] = list(grouped(_shuffled(name, answered, seed), count))
    without_answer = [Item(row["question"], f"minerva#{n}") for n, row in enumerate(items("minerva_math"))]
    found = [item for item in without_answer if len(item.question) <= LONGEST]
    chosen["minerva_math"] = _shuffled("minerva_math", found, seed)[:count]
    return chosen


def own_option_sets(count: int = 40, seed: int = 0) -> dict[str, list[Item]]:
    """The benchmarks that have options of their own, with these."""
    return {name: _shuffled(name, found, seed)[:count] for name, found in _with_own_options().items()}


def _shuffled(name: str, found: Sequence[Item], seed: int) -> list[Item]:
    order = list(found)
    random.Random(f"{seed} {name.partition('_')[0]}").shuffle(order)  # the same rows of MGSM in all languages
    return order


def grouped(found: Sequence[Item], count: int) -> Iterator[Item]:
    """Items in groups of four, each with the answers of its group; no two of a group have the same answer."""
    waiting = list(found)
    for _ in range(count // GROUP):
        group: list[Item] = []
        for item in waiting:
            if len(group) < GROUP and item.options[0].casefold() not in {one.options[0].casefold() for one in group}:
                group.append(item)
        if len(group) < GROUP:
            return
        waiting = [item for item in waiting if item not in group]
        answers = tuple(item.options[0] for item in group)
        for right, item in enumerate(group):
            yield Item(item.question, item.unit, answers, right, item.ending)


def _short(item: Item) -> bool:
    return len(item.question) <= LONGEST and 0 < max(map(len, item.options)) <= LONGEST_ANSWER


def _with_own_options() -> dict[str, list[Item]]:
    rows = {
        name: [(f"{name}#{number}", row) for number, row in enumerate(items(name))]
        for name in ("aqua", "gaokao_math_qa", "sat_math")
    }
    start, stem = 0, items("mmlu_stem")
    for subject, size in SUBJECTS:
        numbers = range(start, start + size)
        rows.setdefault(f"mmlu_{subject}", []).extend((f"mmlu#{n}", stem[n]) for n in numbers if n % 2)
        start += size
    split = {
        name: [split_options(name, row["question"], row["answer"], unit) for unit, row in of_name]
        for name, of_name in rows.items()
    }
    return {name: [item for item in found if item is not None and _short(item)] for name, found in split.items()}


def split_options(name: str, question: str, answer: str, unit: str = "") -> Item | None:
    """The question and its options apart; None where they are not all there, or not all different."""
    stem, *parts = _OPTION["mmlu" if name.startswith("mmlu") else name].split(question)
    letters = parts[::2]
    options = tuple(re.sub(r"^[A-E]\)", "", part.strip()).strip() for part in parts[1::2])
    wanted = "ABCDE" if name == "aqua" else "ABCD"
    if "".join(letters) != wanted or answer not in letters or "" in options:
        return None
    if len({option.casefold() for option in options}) < len(options) or not stem.strip():
        return None
    return Item(stem.strip(), unit, options, letters.index(answer))


def _without_options() -> dict[str, list[Item]]:
    """Items with their own answer as the only option, of the benchmarks without options."""

    def read(name: str, answer: Callable[[str], str], step: int = 1, first: int = 0) -> list[Item]:
        rows = items(name)
        learned = {row["question"] for row in rows[::step]} if step > 1 else set()  # some stand there twice
        found = [
            Item(row["question"].strip(), f"{name}#{number}", (answer(row["answer"]),))
            for number, row in list(enumerate(rows))[first::step]
            if row["question"] not in learned
        ]
        return [item for item in found if _short(item)]

    sets = {
        "college_math": read("college_math", str.strip, 2, 1),
        "gsm8k": read("gsm8k_test", lambda text: text.rpartition("####")[2].strip(), 2, MGSM + 1),
        "mawps": read("mawps", _number, 2, 1),
        "svamp": read("svamp", _number),
        "olympiadbench": read("olympiadbench", lambda text: str(ast.literal_eval(text)[0]).strip()),
        "humaneval": [item for item in _programs() if _short(item)],
    }
    translated = {language: [line.split("\t") for line in lines(f"mgsm/{language}.tsv")] for language in LANGUAGES}
    numbers = [n for n in range(1, MGSM, 2) if len(translated["en"][n][0]) <= LONGEST_TRANSLATED]
    for language, rows in translated.items():
        sets[f"mgsm_{language}"] = [Item(rows[n][0], f"gsm8k_test#{n}", (rows[n][1].strip(),)) for n in numbers]
    return sets


def _number(text: str) -> str:
    return text.strip().removesuffix(".0")


def _programs() -> Iterator[Item]:
    """HumanEval: the beginning of the solution is the answer."""
    with gzip.open(data_folder() / "benchmarks" / "humaneval.jsonl.gz", "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            solution = row["canonical_solution"].rstrip()[:LONGEST_ANSWER]
            yield Item(row["prompt"].strip("\n") + "\n", row["task_id"], (solution,), 0, "")
