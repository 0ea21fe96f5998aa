"""Unicode scripts in text, and which of them identify a language.

A character belongs to a script if it is a letter (general category L) whose Unicode property Script names it. Digits,
punctuation, white space, symbols and emoji never belong to one, also where Unicode assigns them (Thai digits, say).
CJK punctuation such as "，" and "。" has the script Common and is no sign of Chinese.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import NoReturn

import regex

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.text.language_labels import language_hint, same_language

_WRITTEN_IN = {
    "Arabic": "ar fa ps ur",
    "Armenian": "hy",
    "Bengali": "bn",
    "Cyrillic": "be bg kk ky mk mn ru tg uk",
    "Devanagari": "hi mr ne",
    "Ethiopic": "am",
    "Georgian": "ka",
    "Greek": "el",
    "Gujarati": "gu",
    "Gurmukhi": "pa",
    "Han": "zh",
    "Hangul": "ko",
    "Hebrew": "he",
    "Kannada": "kn",
    "Khmer": "km",
    "Lao": "lo",
    "Latin": (
        "af az bs ca cs cy da de en es et eu fi fil fr ga gl ha hr hu id ig is it jv lt lv ms mt nl no pl pt ro sk sl "
        "so sq sv sw tl tr uz vi xh yo zu"
    ),
    "Malayalam": "ml",
    "Myanmar": "my",
    "Sinhala": "si",
    "Tamil": "ta",
    "Telugu": "te",
    "Thai": "th",
}
KANA = ("Hiragana", "Katakana")
JAPANESE = "Katakana_Or_Hiragana"
"""Both kana by one name, that of Unicode: the script by which a switch to Japanese is seen"""

SCRIPTS_OF_LANGUAGE: dict[str, tuple[str, ...]] = {
    **{language: (script,) for script, languages in _WRITTEN_IN.items() for language in languages.split()},
    "ja": (*KANA, "Han"),
    "sr": ("Cyrillic", "Latin"),
}
"""The scripts in which a language (ISO 639 code) is written, by their Unicode names."""

# A full stop ends a sentence only before white space, so that "3.5" stays whole.
_SENTENCE_END = regex.compile(r"(?<=[。！？｡．])|(?<=[.!?…])\s+|[\r\n]+")


@cache
def script_pattern(script: str) -> regex.Pattern[str]:
    """Pattern of one letter of `script`, e.g. "Han"; "Katakana_Or_Hiragana" is either kana.

    ValueError if Unicode has no such script, and for "Common" and "Inherited", the characters of all scripts.
    """
    members = "".join(rf"\p{{Script={name}}}" for name in (KANA if script == JAPANESE else (script,)))
    try:
        # Letters only: an empty name, or one with a brace, would compile to something else.
        well_formed = script.replace("_", "").isalpha() and script not in ("Common", "Inherited")
        pattern = regex.compile(rf"[\p{{L}}&&[{members}]]", regex.VERSION1) if well_formed else None
    except regex.error:
        pattern = None
    if pattern is None:
        raise UserValueError(f"{script!r} is not a Unicode script; expected a name such as Han, Hangul or Cyrillic.")
    return pattern


def contains_script(text: str, script: str) -> bool:
    """Whether any letter of `text` is of `script`. ValueError if Unicode has no such script."""
    return script_pattern(script).search(text) is not None


def script_counts(text: str) -> dict[str, int]:
    """Letters of `text` per script, for the scripts in `SCRIPTS_OF_LANGUAGE` that occur, most frequent first."""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if script := _script_of(character):
            counts[script] += count
    return dict(counts.most_common())


@cache
def _script_of(character: str) -> str | None:
    """The script in `SCRIPTS_OF_LANGUAGE` whose letter this is."""
    return next((script for script in _KNOWN_SCRIPTS if script_pattern(script).match(character)), None)


def sentences(text: str) -> list[str]:
    """`text` cut at sentence-final punctuation and line breaks, empty pieces left out."""
    return [piece for piece in _SENTENCE_END.split(text) if piece and not piece.isspace()]


def has_kana(text: str) -> bool:
    """Whether `text` contains Hiragana or Katakana."""
    return any(contains_script(text, script) for script in KANA)


def language_code(name: str) -> str:
    """The code in `SCRIPTS_OF_LANGUAGE` for the language that a FeatureSet or a file calls `name`: "zh" for "zh-CN".

    ValueError, with the known codes, if it names none.
    """
    code = name if name in SCRIPTS_OF_LANGUAGE else same_language(name, SCRIPTS_OF_LANGUAGE)
    return code if code is not None else _unknown(name)


def scripts_of_name(name: str) -> tuple[str, ...]:
    """The scripts of the language that a FeatureSet or a file calls `name`; none for the name of another class."""
    code = name if name in SCRIPTS_OF_LANGUAGE else same_language(name, SCRIPTS_OF_LANGUAGE)
    return SCRIPTS_OF_LANGUAGE[code] if code is not None else ()


def language_scripts(language: str) -> tuple[str, ...]:
    """The scripts of `language`. ValueError, with the code that was meant, if it is not in `SCRIPTS_OF_LANGUAGE`."""
    return SCRIPTS_OF_LANGUAGE[language if language in SCRIPTS_OF_LANGUAGE else _unknown(language)]


def _unknown(language: str) -> NoReturn:
    known = ", ".join(sorted(SCRIPTS_OF_LANGUAGE))
    hint = language_hint(language, SCRIPTS_OF_LANGUAGE)
    raise UserValueError(f"Unknown language {language!r}.{hint} Expected one of: {known}.")


def target_script(language: str) -> str:
    """The script by which text in `language` is recognised, e.g. "Han" for "zh", and both kana for "ja".

    Related languages may share it (Cyrillic: Russian and Ukrainian); SASFT detects by script alone, too. Japanese is
    seen by its kana, not by kanji, which are Chinese characters.

    Raises:
        ValueError: the language is unknown, is written in several scripts of other languages, or in Latin letters,
            which occur in text of every language (names, formulas, code) and say nothing.
    """
    scripts = language_scripts(language)
    if set(KANA) <= set(scripts):
        return JAPANESE
    if len(scripts) > 1 or scripts == ("Latin",):
        raise UserValueError(
            f"{language!r} has no script of its own ({', '.join(scripts)}), so a switch to it cannot be seen in the "
            "characters; choose a target such as zh, ja, ko, ru, th or ar."
        )
    return scripts[0]


def check_source(target: str, source: str) -> None:
    """ValueError if text in `source` may rightly contain the script of `target`."""
    script = target_script(target)
    if set(KANA if script == JAPANESE else (script,)) & set(language_scripts(source)):
        raise UserValueError(
            f"Text in {source!r} is itself written with {script}, so a switch to {target!r} cannot be distinguished "
            "from it by script; leave this source language out."
        )


def contains_language_script(text: str, target: str, source: str | None = None) -> bool:
    """Whether `text` contains any character of the script of `target`: the switching detector of SASFT.

    SASFT counts a response as switched if any single character is of the target's script (report, Eq. 24). One thing
    is added for Chinese: Han in a sentence that also contains kana is Japanese and does not count. A sentence of
    kanji alone cannot be distinguished from Chinese and does. A switch to Japanese is any kana, whatever the source.

    Args:
        text: the response.
        target: language code with a script of its own, e.g. "zh", or "ja".
        source: language that the response should be in, if known.

    Raises:
        ValueError: a language is unknown, `target` has no script of its own, or `source` is written with it.
    """
    script = target_script(target)
    if source is not None:
        check_source(target, source)
    if not contains_script(text, script):
        return False
    if script != "Han" or not has_kana(text):
        return True
    return any(contains_script(sentence, script) and not has_kana(sentence) for sentence in sentences(text))


_KNOWN_SCRIPTS = tuple(sorted({script for scripts in SCRIPTS_OF_LANGUAGE.values() for script in scripts}))
