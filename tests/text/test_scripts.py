"""Script detection against the names of characters in unicodedata, and the detector's exceptions."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope_posttrain.evaluation.code_switching import ScriptDetector
from qscope_posttrain.text.scripts import (
    SCRIPTS_OF_LANGUAGE,
    contains_language_script,
    contains_script,
    language_by_script,
    language_scripts,
    script_counts,
    sentences,
    target_script,
)

NAME_PREFIX = {
    "Han": ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH"),
    "Hangul": ("HANGUL",),
    "Cyrillic": ("CYRILLIC",),
    "Thai": ("THAI",),
    "Hiragana": ("HIRAGANA", "HENTAIGANA"),
}
# Letters whose script is not what the first word of their name says: modifier letters and the like.
characters = st.characters(exclude_categories=("Cs", "Cn", "Lm", "Co"))


def test_every_letter_of_the_basic_plane_agrees_with_its_name():
    for code in range(0x10000):
        character = chr(code)
        name = unicodedata.name(character, "")
        category = unicodedata.category(character)
        if not name or category == "Lm" or name.startswith("HALFWIDTH"):
            continue
        for script, prefixes in NAME_PREFIX.items():
            expected = name.startswith(prefixes) and category[0] == "L"
            assert contains_script(character, script) == expected, (hex(code), name, script)


@given(st.text(characters, max_size=40))
def test_counts_agree_with_a_character_by_character_count(text):
    counts = script_counts(text)
    for script, prefixes in NAME_PREFIX.items():
        letters = [c for c in text if unicodedata.category(c)[0] == "L"]
        named = sum(unicodedata.name(c, "").removeprefix("HALFWIDTH ").startswith(prefixes) for c in letters)
        assert counts.get(script, 0) == named
        assert contains_script(text, script) == (named > 0)
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


@given(st.text(st.characters(exclude_categories=["L", "Cs", "Cn"])))
def test_digits_punctuation_symbols_and_emoji_never_count(text):
    assert script_counts(text) == {}
    assert not contains_language_script(text, "zh")


@pytest.mark.parametrize(
    ("text", "switched"),
    [
        ("The answer is 42, 你.", True),
        ("Ответ 42，да。「」、～！？：；（）【】《》…", False),
        ("１２３ ④ ㊗️ 🀄 ㍿ 〒 〓", False),
        ("東京へ行きました。", False),
        ("彼は3.5円の品を買う。", False),
        ("東京へ行きました。我去了东京。", True),
        ("カタカナ語と漢字", False),
        ("価格は3.5円高", False),
        ("彼は学生です\n他是学生", True),
        ("", False),
        ("좋은 아침입니다", False),
        ("𠀀", True),
    ],
)
def test_switch_to_chinese(text, switched):
    assert contains_language_script(text, "zh") is switched


@given(st.text(), st.text(), st.sampled_from("的一是不了人我在有他"))
def test_one_character_anywhere_is_a_switch_where_no_kana_is(before, after, character):
    text = f"{before}{character}{after}"
    if not (contains_script(text, "Hiragana") or contains_script(text, "Katakana")):
        assert contains_language_script(text, "zh")


def test_other_targets():
    assert contains_language_script("Thai text with кот", "ru", source="en")
    assert contains_language_script("ประเทศไทย 한국", "ko", source="th")
    assert not contains_language_script("ประเทศไทย ๑๒๓", "ko", source="th")
    assert not contains_language_script("๑๒๓ ฿", "th", source="en")


@pytest.mark.parametrize(("target", "source"), [("zh", "ja"), ("zh", "zh"), ("ru", "uk"), ("ru", "sr"), ("ar", "fa")])
def test_source_that_writes_the_target_script_is_refused(target, source):
    with pytest.raises(ValueError, match=f"'{source}' is itself written with"):
        contains_language_script("x", target, source)


def test_target_script():
    assert [target_script(language) for language in ("zh", "ko", "ru", "th")] == ["Han", "Hangul", "Cyrillic", "Thai"]
    assert target_script("ja") == "Katakana_Or_Hiragana"
    for language in ("en", "vi", "sr"):
        with pytest.raises(ValueError, match="no script of its own"):
            target_script(language)
    with pytest.raises(ValueError, match=r"Unknown language 'xx'.*zh"):
        language_scripts("xx")


@pytest.mark.parametrize(
    ("text", "source", "switched"),
    [
        ("これは港を出た小さな船です。", "zh", True),
        ("コンピューター", "zh", True),
        ("我喜欢ラーメン。", "zh", True),
        ("小船离开了港口。", "zh", False),
        ("東京都", "zh", False),  # kanji alone cannot be told from Chinese
        ("长音ー、句号。「」・", "zh", False),
        ("The boat は left.", "en", True),
        ("The boat left.", "en", False),
        ("ㅋㅋ 배는 떠났다", "ko", False),
    ],
)
def test_switch_to_japanese_shows_in_kana(text, source, switched):
    assert contains_language_script(text, "ja", source) is switched
    assert ScriptDetector("ja")(text, source) is switched


@pytest.mark.parametrize("source", ["ja", "klingon"])
def test_sources_of_a_switch_to_japanese(source):
    with pytest.raises(ValueError, match=r"itself written with|Unknown language"):
        contains_language_script("x", "ja", source)


@pytest.mark.parametrize("script", ["Klingon", "Common", "Inherited", "", "Han}", "zh"])
def test_unknown_scripts_are_refused(script):
    with pytest.raises(ValueError, match="not a Unicode script"):
        contains_script("x", script)


def test_every_script_in_the_table_exists():
    for scripts in SCRIPTS_OF_LANGUAGE.values():
        for script in scripts:
            assert not contains_script("1", script)


def test_sentences():
    assert sentences("Pi is 3.14. Is it? Yes!\n\n好。对！") == ["Pi is 3.14.", "Is it?", "Yes!", "好。", "对！"]


@pytest.mark.parametrize(
    ("text", "languages", "expected"),
    [
        ("Привет, world", ["ru", "en"], "ru"),
        ("Hello, мир", ["ru", "en"], "en"),
        ("Hello", ["fr", "en"], None),
        ("Hello", ["ru", "zh"], None),
        ("123 !?", ["en", "zh"], None),
        ("", ["en"], None),
        ("你好，世界", ["zh", "ja", "en"], "zh"),
        ("東京タワーへ行く", ["zh", "ja", "en"], "ja"),
        ("漢字漢字漢字と仮名", ["zh", "ja"], "ja"),
        ("東京都", ["ja", "en"], "ja"),
        ("ab вг", ["en", "ru"], None),
    ],
)
def test_language_by_script(text, languages, expected):
    assert language_by_script(text, languages) == expected


def test_language_by_evidence_on_sentences(texts):
    languages = ["zh", "ja", "ru", "ko", "en"]
    for language in ("zh", "ru", "ko"):
        assert {language_by_script(text, languages) for text in texts[language]} == {language}
    with pytest.raises(ValueError, match="Unknown language 'klingon'"):
        language_by_script("a", ["klingon"])


def test_real_text(shared_data):
    """Chinese lines are nearly all found, lines of Latin and Hangul text nearly never taken for Chinese."""
    share = {}
    for language in ("zh", "en", "fr", "ko", "ru"):
        lines = (shared_data / "tatoeba" / f"{language}.txt").read_text(encoding="utf-8").splitlines()[:2000]
        share[language] = sum(contains_language_script(line, "zh") for line in lines) / len(lines)
    assert share["zh"] > 0.99
    assert max(share[language] for language in ("en", "fr", "ko", "ru")) < 0.005
