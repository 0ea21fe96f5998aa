"""The generator: reproducible, in the right script, complete, and varied enough to be more than templates."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from benchmarks.testbed.switching.grammar import LANGUAGES, Grammar, read_lexicon, write_paragraphs
from qscope_posttrain.text.scripts import script_counts

SCRIPTS = {"en": "Latin", "fr": "Latin", "ru": "Cyrillic", "ko": "Hangul", "zh": "Han"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_same_arguments_give_same_text_and_another_seed_another(language: str) -> None:
    first = write_paragraphs(language, 3000, seed=1)
    assert first == write_paragraphs(language, 3000, seed=1)
    assert not set(first) & set(write_paragraphs(language, 3000, seed=2))
    assert sum(map(len, first)) >= 3000


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_letter_is_of_the_languages_script(language: str) -> None:
    counts = script_counts(" ".join(write_paragraphs(language, 40_000)))
    assert set(counts) == {SCRIPTS[language]}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_symbol_of_a_rule_is_defined_and_every_definition_used(language: str) -> None:
    lexicon = read_lexicon()[language]
    rules, words = lexicon["rules"], lexicon["words"]
    parts = {
        part
        for alternatives in rules.values()
        for alternative in alternatives
        for item in alternative.split(" ")
        for part in item.split("+")
    }
    assert "" not in parts
    symbols = {part for part in parts if re.fullmatch("[A-Z]+", part)}
    defined = set(rules) | set(words)
    assert symbols - defined == set()
    assert defined - symbols == {"S"}
    assert not set(rules) & set(words)


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_varied_and_end(language: str) -> None:
    grammar = Grammar(language)
    paragraphs = write_paragraphs(language, 60_000)
    assert len(set(paragraphs)) == len(paragraphs)
    lengths = Counter(len(paragraph) // 20 for paragraph in paragraphs)
    assert len(lengths) > 8
    words = sum(len(words) for words, _ in grammar._words.values())
    assert words > 500
    assert all(paragraph[-1] in '.!?"。！？”' for paragraph in paragraphs)
    assert not any(re.search(r"[,，]\s*[.。,，]", paragraph) for paragraph in paragraphs)


def test_frequent_words_are_frequent() -> None:
    text = Counter(re.findall(r"[a-z]+", " ".join(write_paragraphs("en", 200_000)).lower()))
    words, _ = Grammar("en")._words["N"]
    assert sum(text[word] for word in words[:20]) > 2 * sum(text[word] for word in words[-20:])


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no grammar for language 'de'.*en, fr"):
        Grammar("de")
