"""Documentation and everyday speech in several languages: a label that is real, without the usual leaks.

Two registers of one language, sentences of the React documentation and sentences that people wrote to be translated
(Tatoeba), differ in far more than what they are about: length, digits, identifiers in Latin letters, punctuation,
headings. Here both lose digits and final punctuation; sentences with a Latin letter (where Latin is not the script) or
a symbol are left out; and the two classes are matched sentence by sentence to the same number of tokens. What is left
to tell them apart is words and how they are put together. How easy that is, a bag-of-tokens baseline tells.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from qscope_posttrain.files import read_lines

ROLES = {"pretraining": 0.3, "discovery": 0.42, "test": 0.28}
"""Share of the text of each register. No sentence has two roles."""
_BLOCKS = 50
_SPEECH_LINES = 1000
"""Everyday sentences read in each language: as many in English as there are in the others."""
_SENTENCES_A_PARAGRAPH = 6
_END = re.compile(r"(?<=[.!?])\s+|(?<=[。？！])")
_PLAIN = re.compile(r"(?:[^\W\d_]|[ ,'’\-，、])+")
_LATIN = re.compile(r"[A-Za-z]")
_LATIN_LANGUAGES = frozenset({"en", "fr"})


class Registers(NamedTuple):
    """Lines of one role and language."""

    speech: tuple[str, ...]
    documentation: tuple[str, ...]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and whether each holds the positive register; texts 2n (positive) and 2n + 1 are a pair."""

    texts: tuple[str, ...]
    labels: tuple[bool, ...]


def read_registers(folder: Path, languages: Sequence[str], seed: int = 0) -> dict[str, dict[str, Registers]]:
    """`{role: {language: lines}}` from `folder/react_docs/<language>.txt` and `folder/tatoeba/<language>.txt`.

    Documentation is dealt in blocks of consecutive paragraphs, so that neighbors share their role.

    Raises:
        FileNotFoundError: a file is not there.
    """
    found: dict[str, dict[str, Registers]] = {role: {} for role in ROLES}
    for language in languages:
        generator = random.Random(f"{language}/{seed}")
        speech = _read(folder / "tatoeba" / f"{language}.txt")
        dealt = _deal(sorted(generator.sample(speech, min(_SPEECH_LINES, len(speech)))), generator)
        documentation = _deal(_read(folder / "react_docs" / f"{language}.txt"), generator)
        for role in ROLES:
            found[role][language] = Registers(dealt[role], documentation[role])
    return found


def write_pretraining(registers: Mapping[str, Registers], folder: Path, paragraphs: int = 2000) -> dict[str, Path]:
    """Write `<language>.txt`, both registers mixed, paragraphs in random order; no labels.

    Args:
        paragraphs: of documentation in a language at most, so that everyday speech is not lost in it.
    """
    places = {}
    for language, lines in registers.items():
        generator = random.Random(language)
        documentation = generator.sample(lines.documentation, min(paragraphs, len(lines.documentation)))
        chunks = [
            lines.speech[i : i + _SENTENCES_A_PARAGRAPH] for i in range(0, len(lines.speech), _SENTENCES_A_PARAGRAPH)
        ]
        mixed = [*documentation, *(" ".join(chunk) for chunk in chunks)]
        generator.shuffle(mixed)
        places[language] = folder / f"{language}.txt"
        places[language].write_text("\n".join(mixed) + "\n", encoding="utf-8")
    return places


def labeled_texts(
    registers: Registers,
    language: str,
    length: Callable[[str], int],
    seed: int,
    positive: Literal["speech", "documentation"] = "documentation",
    background: int = 0,
) -> LabelledTexts:
    """Sentences of both registers in pairs of the same length, or longer texts that hold one of them.

    Args:
        length: of a sentence, in tokens.
        seed: of the choice and the order.
        positive: the register to be found.
        background: with n > 0 every text has n sentences of the other register around the one that decides, at a
            random place: the positive register is planted in the other, or nothing is. They come from a half of that
            register's sentences which gives no pairs, and may occur in several texts.
    """
    generator = random.Random(f"{language}/{seed}")
    found = dict(zip(Registers._fields, (_sentences(lines, language) for lines in registers), strict=True))
    wanted = found.pop(positive)
    (others,) = found.values()
    others = generator.sample(others, len(others))
    cut = len(others) // 2 if background else len(others)
    pairs = _matched(wanted, others[:cut], length, generator)
    texts = []
    for pair in pairs:
        for sentence in pair:
            parts = generator.sample(others[cut:], background)
            parts.insert(generator.randint(0, background), sentence)
            texts.append(("。" if language == "zh" else ". ").join(parts))
    return LabelledTexts(tuple(texts), (True, False) * len(pairs))


def _matched(
    first: Sequence[str], second: Sequence[str], length: Callable[[str], int], generator: random.Random
) -> list[tuple[str, str]]:
    """Pairs of equal length, each sentence in one pair at most, in random order."""
    groups: dict[int, list[str]] = defaultdict(list)
    for sentence in generator.sample(second, len(second)):
        groups[length(sentence)].append(sentence)
    shuffled = generator.sample(first, len(first))
    return [(sentence, groups[size].pop()) for sentence in shuffled if groups[size := length(sentence)]]


def _sentences(lines: Sequence[str], language: str) -> list[str]:
    """Distinct plain sentences of the lines, without their final punctuation."""
    found: dict[str, None] = {}
    for line in lines:
        for sentence in _END.split(line):
            bare = sentence.strip().rstrip(".!?。？！ ")
            if _PLAIN.fullmatch(bare) and (language in _LATIN_LANGUAGES or not _LATIN.search(bare)):
                found[bare] = None
    return list(found)


def _deal(lines: Sequence[str], generator: random.Random) -> dict[str, tuple[str, ...]]:
    """Deal blocks of consecutive lines to the roles."""
    edges = [len(lines) * block // _BLOCKS for block in range(_BLOCKS + 1)]
    order = generator.sample(range(_BLOCKS), _BLOCKS)
    dealt: dict[str, tuple[str, ...]] = {}
    start = 0.0
    for role, share in ROLES.items():
        chosen = sorted(order[round(start * _BLOCKS) : round((start + share) * _BLOCKS)])
        dealt[role] = tuple(line for block in chosen for line in lines[edges[block] : edges[block + 1]])
        start += share
    return dealt


def _read(path: Path) -> list[str]:
    return list(dict.fromkeys(line.strip() for line in read_lines(path, "text") if line.strip()))
