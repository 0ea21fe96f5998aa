"""Tell the language of a text by its scripts alone: exact, offline, and silent where scripts cannot decide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from qscope_posttrain.text.scripts import KANA, has_kana, language_scripts, script_counts, sentences


def language_by_script(text: str, languages: Iterable[str]) -> str | None:
    """The one of `languages` that writes the most frequent script of `text`.

    Han in a sentence with kana counts as Japanese. Where only Han speaks, Chinese goes before Japanese.

    Returns:
        The language, or None where scripts do not decide: no letters, two scripts equally frequent, no candidate
        that writes the script, or several of them (English and French).

    Raises:
        ValueError: a language is not in `SCRIPTS_OF_LANGUAGE`.
    """
    scripts_of = {language: language_scripts(language) for language in languages}
    counts: Counter[str] = Counter()
    for sentence in sentences(text):
        # One entry stands for all of Japanese, which mixes three scripts in a sentence.
        japanese = has_kana(sentence)
        for script, count in script_counts(sentence).items():
            counts["Hiragana" if japanese and script in (*KANA, "Han") else script] += count

    ranked = counts.most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    script = ranked[0][0]
    candidates = [language for language, scripts in scripts_of.items() if script in scripts]
    if script == "Han" and len(candidates) > 1:
        candidates = [language for language in candidates if not set(KANA) & set(scripts_of[language])]
    return candidates[0] if len(candidates) == 1 else None
