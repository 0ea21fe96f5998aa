"""A generator of text in five languages: word lists and a light grammar, independent draws, Zipfian frequencies.

`lexicon.json` holds the word lists and the context-free grammar of each language. A rule's alternative is a sequence of
items separated by spaces; an item is one or more parts joined by `+` (no space between them in the text); a part is the
name of a rule, the name of a word list, or literal text. Alternatives are equally likely (write one twice to double
it); words are drawn with probability proportional to 1 / (rank + 4)^0.8 after a fixed shuffle of the list.

Every draw is independent: no topic, no slot filled twice. What a reader can carry over a distance is therefore the
language itself, which is what the testbed needs; templates with recurring slots give an SAE features of slots instead.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from importlib import resources
from itertools import accumulate
from typing import Any

from qscope_posttrain.errors import UserValueError

LANGUAGES = ("en", "fr", "ru", "ko", "zh")
"""Languages that the generator can write."""

_ZIPF_EXPONENT = 0.8
_ZIPF_OFFSET = 4
_CLOSING = tuple(".,;:!?»%、，。；：！？”")
_SENTENCES = (2, 7)
"""Sentences in a paragraph, inclusive."""


@cache
def read_lexicon() -> dict[str, Any]:
    """Read word lists, rules and joiner of every language; a word list is a list of lines."""
    text = resources.files(__package__).joinpath("lexicon.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


class Grammar:
    """Draws sentences of one language from its word lists and rules."""

    def __init__(self, language: str) -> None:
        if language not in LANGUAGES:
            raise UserValueError(f"no grammar for language {language!r}; the generator writes {', '.join(LANGUAGES)}")
        lexicon = read_lexicon()[language]
        self.joiner: str = lexicon["joiner"]
        """Between words: a space, or nothing."""
        self._rules = {
            name: [[item.split("+") for item in alternative.split(" ")] for alternative in alternatives]
            for name, alternatives in lexicon["rules"].items()
        }
        self._words: dict[str, tuple[list[str], list[float]]] = {}
        for name, lines in lexicon["words"].items():
            words = " ".join(lines).split()
            random.Random(f"{language}/{name}").shuffle(words)
            weights = accumulate((rank + _ZIPF_OFFSET) ** -_ZIPF_EXPONENT for rank in range(len(words)))
            self._words[name] = (words, list(weights))

    def sentence(self, rng: random.Random) -> str:
        """Write one sentence, its first letter upper case where the script has case."""
        text = ""
        for piece in self._expand("S", rng):
            if text.endswith((",", "，")) and piece in _CLOSING:  # a relative clause that ends its clause
                text = text[:-1]
            glue = "" if not text or piece in _CLOSING or text.endswith(("«", "“")) else self.joiner
            text += glue + piece
        return text[:1].upper() + text[1:]

    def paragraph(self, rng: random.Random) -> str:
        """Write between two and seven sentences on one line."""
        return self.joiner.join(self.sentence(rng) for _ in range(rng.randint(*_SENTENCES)))

    def _expand(self, symbol: str, rng: random.Random) -> Iterator[str]:
        """Yield the pieces of `symbol`, left to right: words, and literals such as punctuation."""
        for item in rng.choice(self._rules[symbol]):
            if len(item) == 1 and item[0] in self._rules:
                yield from self._expand(item[0], rng)
            else:
                yield "".join(self._part(part, rng) for part in item)

    def _part(self, part: str, rng: random.Random) -> str:
        if part in self._rules:
            return self.joiner.join(self._expand(part, rng))
        if part in self._words:
            words, weights = self._words[part]
            return rng.choices(words, cum_weights=weights)[0]
        return part


def write_paragraphs(language: str, characters: int, seed: int = 0) -> list[str]:
    """Write paragraphs with at least `characters` characters in all; the same for the same arguments."""
    grammar = Grammar(language)
    rng = random.Random(f"{language}/{seed}")
    paragraphs: list[str] = []
    written = 0
    while written < characters:
        paragraphs.append(grammar.paragraph(rng))
        written += len(paragraphs[-1])
    return paragraphs
