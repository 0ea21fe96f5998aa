"""Detect the language of a text by its scripts alone: exact, offline, and silent where scripts cannot decide."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import regex

from qscope_posttrain.text.scripts import KANA, SCRIPTS_OF_LANGUAGE, has_kana, language_code, script_counts, sentences

# Letters of an alphabet that say as much as one of these. In the translations of MGSM and Tatoeba, English has 2.8
# times the letters of Chinese and 2.1 times the syllables of Korean, and 0.9 to 1.1 times the letters of Russian and
# French. A kana is a syllable as well.
_LETTERS_WORTH = {"Han": 3.0, "Hangul": 2.0, "Hiragana": 2.0, "Katakana": 2.0, "Ethiopic": 2.0}
# Names go into text of every language in Latin letters. A word with a capital within a sentence is taken for one.
_NAME = regex.compile(r"(?<!\p{Latin})\p{Latin}*\p{Lu}\p{Latin}*")
_NAME_WORTH = 0.25
_STARTS_SENTENCE = regex.compile(r"(?:\A|[.!?。！？:：\n])[\p{P}\p{Z}\s]*\Z")
_BEFORE_NAME = 8  # characters in which a sentence's beginning shows
_NOT_PROSE = regex.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`|(?<=\n[ \t]*\n)(?:(?: {4}|\t)[^\n]*\n?)+"  # code
    r"|<tool_call>.*?(?:</tool_call>|\Z)"
    r"|\\begin\{(equation|align|gather|multline|math|displaymath)(\*?)\}.{0,2000}?\\end\{\1\2\}"
    r"|\$\$.*?\$\$|\$[^$\n]+\$|\\\(.*?\\\)|\\\[.*?\\\]|\\\p{L}+"  # formulas
    r"|\b(?:https?://|www\.)[!-~]+|(?<![A-Za-z0-9_.+-])[A-Za-z0-9_.+-]++@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"  # addresses
    r"|<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]"  # marks of chat templates
    r"|(?<![\p{L}\p{M}'’])[\p{Latin}\p{Greek}](?![\p{L}\p{M}'’])",  # x, μ, A: symbols and choices
    regex.DOTALL,
)


def prose(text: str) -> str:
    """`text` without code, formulas, addresses, tags and single letters, which are the same in every language."""
    return _NOT_PROSE.sub(" ", text)


def script_evidence(text: str) -> dict[str, float]:
    """Measure how much of `text` each script writes, in letters of an alphabet, most first.

    A Han character counts as 3 letters, a syllable of Hangul, kana or Ethiopic as 2. Where several scripts are mixed,
    Latin words with a capital within a sentence, mostly names, count a quarter. Han in a sentence with kana counts as
    "Hiragana", which stands for all of Japanese.
    """
    counts: defaultdict[str, float] = defaultdict(float)
    for letters in map(script_counts, sentences(text) if has_kana(text) else [text]):
        japanese = set(KANA) & set(letters)  # which mixes three scripts in a sentence
        for script, count in letters.items():
            name = "Hiragana" if japanese and script in (*KANA, "Han") else script
            counts[name] += count * _LETTERS_WORTH.get(script, 1.0)
    if len(counts) > 1 and "Latin" in counts:
        counts["Latin"] -= (1 - _NAME_WORTH) * sum(
            len(name[0])
            for name in _NAME.finditer(text)
            if not _STARTS_SENTENCE.search(text, max(name.start() - _BEFORE_NAME, 0), name.start())
        )
    return dict(sorted(counts.items(), key=lambda entry: -entry[1]))


def language_by_script(text: str, languages: Collection[str]) -> str | None:
    """Find the one of `languages` (codes, or names such as "zh-CN") that writes the script of which `text` has most.

    None where scripts do not decide: no letters, two scripts equally frequent, no candidate that writes the script, or
    several of them (English and French). Of text in Han alone, Chinese goes before Japanese.
    """
    return language_by_evidence(script_evidence(text), languages)


def language_by_evidence(evidence: Mapping[str, float], languages: Collection[str]) -> str | None:
    """Do the same for a text of this `script_evidence`."""
    scripts_of = {language: SCRIPTS_OF_LANGUAGE[language_code(language)] for language in languages}
    ranked = list(evidence.items())[:2]
    if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    script = ranked[0][0]
    candidates = [language for language, scripts in scripts_of.items() if script in scripts]
    if script == "Han" and len(candidates) > 1:
        candidates = [language for language in candidates if not set(KANA) & set(scripts_of[language])]
    return candidates[0] if len(candidates) == 1 else None
