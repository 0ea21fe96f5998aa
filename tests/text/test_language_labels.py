"""Other spellings of a language are recognised, and the labels of a column are read as a whole."""

from __future__ import annotations

import json
import math

import pytest
from datasets import ClassLabel, Dataset

from qscope_posttrain.text.inputs import read_file
from qscope_posttrain.text.scripts import (
    SCRIPTS_OF_LANGUAGE,
    class_names,
    distinct_labels,
    language_code,
    language_hint,
    language_scripts,
    same_language,
    target_script,
)

SPELLINGS = {
    "zh": ("ZH", "Zh", " zh", "zh\n", "zh-CN", "zh_CN", "zh-cn", "zh-TW", "zh_Hans", "zh-Hant-HK", "zho", "chi", "cmn"),
    "en": ("EN", "en-US", "en_GB", "en_US.UTF-8", "eng", "eng_Latn", "English", "english"),
    "he": ("iw", "heb", "he-IL", "heb_Hebr", "Hebrew"),
    "no": ("nb", "nn", "nob", "nor", "nb-NO"),
    "ja": ("jpn", "jpn_Jpan", "ja-JP", "Japanese", "JA"),
    "ko": ("kor", "kor_Hang", "ko-KR"),
    "ar": ("arb", "arb_Arab", "ara", "ar-EG"),
    "fa": ("pes", "per", "fas"),
    "ms": ("zsm", "may"),
    "id": ("in", "ind"),
    "sr": ("sr-Latn", "srp_Cyrl"),
    "uz": ("uzn_Latn",),
}


@pytest.mark.parametrize(("code", "label"), [(code, label) for code, labels in SPELLINGS.items() for label in labels])
def test_spellings(code, label):
    """A label of data is refused with the code that it stands for; a name of a FeatureSet is understood."""
    assert same_language(label, SCRIPTS_OF_LANGUAGE) == code
    assert language_code(label) == code
    with pytest.raises(ValueError, match=f"Unknown language .* Did you mean '{code}'"):
        language_scripts(label)


@pytest.mark.parametrize("label", ["zho_Hans", "Chinese", "mandarin", "cn"])
def test_spellings_of_a_target(label):
    with pytest.raises(ValueError, match="Did you mean 'zh'"):
        target_script(label)


@pytest.mark.parametrize("label", ["harmful", "", "  ", "x", "und", "zxx", "yue", "xx", None, math.nan, 3, ["zh"]])
def test_what_is_no_known_language_is_not_guessed(label):
    assert same_language(label, SCRIPTS_OF_LANGUAGE) is None
    assert language_hint(label, ("en", "zh")) == ""


def test_the_known_names_may_be_regional_or_free():
    assert same_language("zh", ("en", "zh-TW", "zh-CN")) == "zh-CN"
    assert same_language("zh_Hant", ("zh-CN", "zh-TW")) == "zh-TW"
    assert same_language("zh-TW", ("en", "zh")) == "zh"
    assert same_language("en-GB", ("harmful", "harmless")) is None
    assert language_hint("Harmfull", ("harmful", "harmless")) == " Did you mean 'harmful'?"


def columns():
    labels = ["en", None, "zh", "en", "", "zh-CN"]
    plain = Dataset.from_dict({"l": labels})
    return {
        "plain": (plain, [("en", 0, 2), (None, 1, 1), ("zh", 2, 1), ("", 4, 1), ("zh-CN", 5, 1)]),
        "selected": (plain.select([5, 3, 3, 1]), [("zh-CN", 0, 1), ("en", 1, 2), (None, 3, 1)]),
        "formatted": (plain.with_format("torch").select([0]), [("en", 0, 1)]),
        "lists": (Dataset.from_dict({"l": [["en"], [], ["zh", "en"]]}), [("en", 0, 2), ("zh", 2, 1)]),
        "numbers": (Dataset.from_dict({"l": [2, 0, 2]}), [(2, 0, 2), (0, 1, 1)]),
        "empty": (Dataset.from_dict({"l": []}), []),
        "mappings": (Dataset.from_dict({"l": [{"a": 1}, {"a": 2}, {"a": 1}]}), [({"a": 1}, 0, 2), ({"a": 2}, 1, 1)]),
        "lists of lists": (Dataset.from_dict({"l": [[["en"]], [["en"], ["zh"]]]}), [(["en"], 0, 2), (["zh"], 1, 1)]),
    }


@pytest.mark.parametrize("kind", columns())
def test_distinct_labels(kind):
    dataset, expected = columns()[kind]
    assert distinct_labels(dataset, "l") == expected


def test_distinct_labels_of_mixed_types_in_a_file(tmp_path):
    rows = [{"l": "en"}, {"l": 5}, {"l": None}, {"l": "en"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = distinct_labels(read_file(tmp_path / "rows.jsonl")["train"], "l")
    assert found == [("en", 0, 2), (5, 1, 1), (None, 2, 1)]


def test_distinct_labels_of_many_rows_and_nan():
    found = distinct_labels(Dataset.from_dict({"l": [1.0] * 25_000 + [math.nan, 2.0, math.nan]}), "l")
    assert [(label.row, label.times) for label in found] == [(0, 25_000), (25_000, 2), (25_001, 1)]
    assert math.isnan(found[1].value)


def test_class_names():
    data = Dataset.from_dict({"l": [1, 0], "text": ["a", "b"]}).cast_column("l", ClassLabel(names=["en", "zh"]))
    assert class_names(data, "l") == ("en", "zh")
    assert class_names(data, "text") == class_names(data, "missing") == class_names(data, len) == ()
    assert class_names(data.to_iterable_dataset(), "l") == ("en", "zh")
