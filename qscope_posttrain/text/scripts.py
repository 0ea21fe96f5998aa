"""Languages by their labels in data and by the scripts of text: exact, offline, silent where they cannot decide.

A character belongs to a script if it is a letter (general category L) whose Unicode property Script names it. Digits,
punctuation, white space, symbols and emoji never belong to one, also where Unicode assigns them (Thai digits, say).
CJK punctuation such as "，" and "。" has the script Common and is no sign of Chinese.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import langcodes
import regex

from qscope_posttrain.errors import UserValueError

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
JAPANESE = "Katakana_Or_Hiragana"  # Unicode's name for both kana: the script by which a switch to Japanese is detected
SCRIPTS_OF_LANGUAGE: dict[str, tuple[str, ...]] = {
    **{language: (script,) for script, languages in _WRITTEN_IN.items() for language in languages.split()},
    "ja": (*KANA, "Han"),
    "sr": ("Cyrillic", "Latin"),
}
"""The scripts in which a language (ISO 639 code) is written, by their Unicode names."""
# A full stop ends a sentence only before white space, so that "3.5" stays whole.
_SENTENCE_END = regex.compile(r"(?<=[。！？｡．])|(?<=[.!?…])\s+|[\r\n]+")
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


@cache
def script_pattern(script: str) -> regex.Pattern[str]:
    """Pattern of one letter of `script`, e.g. "Han"; "Katakana_Or_Hiragana" is either kana. ValueError if Unicode has
    no such script, and for "Common" and "Inherited", the characters of all scripts."""
    members = "".join(rf"\p{{Script={name}}}" for name in (KANA if script == JAPANESE else (script,)))
    # Letters only: an empty name, or one with a brace, would compile to something else.
    if script.replace("_", "").isalpha() and script not in ("Common", "Inherited"):
        with suppress(regex.error):
            return regex.compile(rf"[\p{{L}}&&[{members}]]", regex.VERSION1)
    raise UserValueError(f"{script!r} is not a Unicode script; expected a name such as Han, Hangul or Cyrillic.")


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
    """The code in `SCRIPTS_OF_LANGUAGE` for the language that a FeatureSet or a file calls `name` ("zh" for "zh-CN");
    ValueError, with the known codes, if it names none."""
    code = name if name in SCRIPTS_OF_LANGUAGE else same_language(name, SCRIPTS_OF_LANGUAGE)
    if code is None:
        raise _unknown(name)
    return code


def scripts_of_name(name: str) -> tuple[str, ...]:
    """The scripts of the language that a FeatureSet or a file calls `name`; none for the name of another class."""
    code = name if name in SCRIPTS_OF_LANGUAGE else same_language(name, SCRIPTS_OF_LANGUAGE)
    return () if code is None else SCRIPTS_OF_LANGUAGE[code]


def language_scripts(language: str) -> tuple[str, ...]:
    """The scripts of `language`. ValueError, with the code that was meant, if it is not in `SCRIPTS_OF_LANGUAGE`."""
    if language not in SCRIPTS_OF_LANGUAGE:
        raise _unknown(language)
    return SCRIPTS_OF_LANGUAGE[language]


def _unknown(language: str) -> UserValueError:
    known, hint = ", ".join(sorted(SCRIPTS_OF_LANGUAGE)), language_hint(language, SCRIPTS_OF_LANGUAGE)
    return UserValueError(f"Unknown language {language!r}.{hint} Expected one of: {known}.")


def target_script(language: str) -> str:
    """The script by which text in `language` is recognized: "Han" for "zh", both kana for "ja" (kanji are Han). Related
    languages may share it (Cyrillic: Russian and Ukrainian); SASFT detects by script alone, too. ValueError for an
    unknown language, one of several scripts, or one in Latin letters, which occur in text of every language."""
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
    """Whether `text`, a response, contains any character of the script of `target`: the switching detector of SASFT.

    SASFT counts a response as switched if any single character is of the target's script (report, Eq. 24). One thing
    is added for Chinese: Han in a sentence that also contains kana is Japanese and does not count. A sentence of
    kanji alone cannot be distinguished from Chinese and does. A switch to Japanese is any kana. ValueError where a
    language is unknown, `target` has no script of its own, or `source`, the response's language, is written with it.
    """
    script = target_script(target)
    if source is not None:
        check_source(target, source)
    if script != "Han" or not has_kana(text):
        return contains_script(text, script)
    return any(contains_script(sentence, script) and not has_kana(sentence) for sentence in sentences(text))


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
    """Find the language that `text` is written in: `language_by_evidence` of its letters."""
    return language_by_evidence(script_evidence(text), languages)


def language_by_evidence(evidence: Mapping[str, float], languages: Collection[str]) -> str | None:
    """Find the one of `languages` (codes, or names such as "zh-CN") that writes the script with most `script_evidence`.
    None where scripts do not decide: no letters, two scripts equally frequent, no candidate that writes the script, or
    several of them (English and French). Of text in Han alone, Chinese goes before Japanese."""
    scripts_of = {language: SCRIPTS_OF_LANGUAGE[language_code(language)] for language in languages}
    ranked = list(evidence.items())[:2]
    if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    script = ranked[0][0]
    candidates = [language for language, scripts in scripts_of.items() if script in scripts]
    if script == "Han" and len(candidates) > 1:
        candidates = [language for language in candidates if not set(KANA) & set(scripts_of[language])]
    return candidates[0] if len(candidates) == 1 else None


_KNOWN_SCRIPTS = tuple(sorted({script for scripts in SCRIPTS_OF_LANGUAGE.values() for script in scripts}))


_ROWS_AT_A_TIME = 10_000


class Label(NamedTuple):
    """A distinct value of a column."""

    value: Any
    row: int  # The first row that holds it
    times: int


def same_language(label: Any, known: Collection[str]) -> str | None:
    """Find the one of `known` that names the language of `label`; of several, one of the same script goes first. Labels
    are BCP 47 tags ("zh-CN", "zh_Hans"), ISO 639 codes ("zho", "iw"), and English names ("Chinese")."""
    if not isinstance(label, str):
        return None
    wanted = _tag(label)
    if wanted is None:
        return None
    same = [(name, tag) for name in known if (tag := _tag(name)) is not None and tag.language == wanted.language]
    script = wanted.maximize().script
    return next((name for name, tag in same if tag.maximize().script == script), same[0][0] if same else None)


def language_hint(label: Any, known: Collection[str]) -> str:
    """Suggest a known label (" Did you mean 'zh'?"), or nothing, after the given label in a message."""
    meant = same_language(label, known)
    if meant is None and isinstance(label, str) and len(label) == 2 and label.isalpha() and label.isascii():
        spoken = langcodes.Language.get(f"und-{label}").maximize().language  # a country, cn or jp; en if it is none
        meant = None if spoken == "en" else same_language(spoken, known)
    if meant is None and isinstance(label, str):
        bare = {name.casefold(): name for name in known}
        close = difflib.get_close_matches(label.strip().casefold(), bare, n=1, cutoff=0.8)
        meant = bare[close[0]] if close else None
    return "" if meant is None or meant == label else f" Did you mean {meant!r}?"


def class_names(dataset: Any, column: Any) -> tuple[str, ...]:
    """The names behind the numbers of a ClassLabel column of `datasets`; none for any other column or rule."""
    features = getattr(dataset, "features", None)
    feature = features.get(column) if features and isinstance(column, str) else None
    return tuple(getattr(feature, "names", None) or ())


def distinct_labels(dataset: Any, column: str) -> list[Label]:
    """Find the distinct values of a column of a `datasets.Dataset`, in the order of their first rows. Entries of lists
    count one by one."""
    first: dict[str, tuple[Any, int]] = {}  # by its text: NaN differs from itself
    times: Counter[str] = Counter()
    rows = dataset.select_columns(column).with_format(None)
    values = (value for batch in rows.iter(batch_size=_ROWS_AT_A_TIME) for value in batch[column])
    for row, value in enumerate(values):
        for entry in value if isinstance(value, list) else [value]:
            first.setdefault(repr(entry), (entry, row))
            times[repr(entry)] += 1
    return [Label(*found, times[text]) for text, found in first.items()]


def _tag(label: str) -> langcodes.Language | None:
    """The label as a tag of a registered language, its macrolanguage for languages that have one; else None."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE  # English names -> codes

    text = label.strip().partition(".")[0]  # en_US.UTF-8
    text = TO_LANGUAGE_CODE.get(text.casefold(), text)
    try:
        tag = langcodes.Language.get(langcodes.standardize_tag(text, macro=True)) if text else None
    except langcodes.LanguageTagError:
        return None
    if tag is None or tag.language is None or not tag.is_valid():
        return None
    # The two written standards of Norwegian are mostly labeled as one.
    return tag.update_dict({"language": "no"}) if tag.language in ("nb", "nn") else tag
