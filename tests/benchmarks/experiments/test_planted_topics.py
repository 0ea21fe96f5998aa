"""Registers dealt to roles, pairs of one length, nothing that gives the label away by form."""

from __future__ import annotations

import re

import pytest

from benchmarks.planted_topics import Registers, labeled_texts, read_registers, write_pretraining


@pytest.fixture(scope="module")
def registers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, word in (("tatoeba", "cat"), ("react_docs", "hook")):
        (folder / name).mkdir()
        for language in ("en", "ru"):
            own = word if language == "en" else {"cat": "кот", "hook": "хук"}[word]
            lines = [f"{own}{f' {own}' * (n % 7)} {_letters(n)}." for n in range(400)]
            lines += [f"{own} has 3 digits.", f"{own} useState here."]
            (folder / name / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_registers(folder, ("en", "ru"), seed=0)


def _letters(number):
    """A number in Cyrillic letters, so that lines differ without digits."""
    return "".join("абвгдежзик"[int(digit)] for digit in str(number))


def test_no_line_has_two_roles(registers):
    for language in ("en", "ru"):
        for position in (0, 1):
            parts = [set(registers[role][language][position]) for role in registers]
            assert not parts[0] & parts[1]
            assert not parts[0] & parts[2]
            assert not parts[1] & parts[2]
            assert [len(part) for part in parts] == pytest.approx([0.3 * 402, 0.42 * 402, 0.28 * 402], abs=12)


@pytest.mark.parametrize("positive", ["speech", "documentation"])
def test_pairs_have_one_length_and_opposite_labels(registers, positive):
    found = labeled_texts(registers["discovery"]["ru"], "ru", lambda text: len(text.split()), 0, positive)
    assert found.labels == (True, False) * (len(found.texts) // 2)
    assert len(found.texts) > 200
    assert len(set(found.texts)) == len(found.texts)
    for first, second in zip(found.texts[::2], found.texts[1::2], strict=True):
        assert len(first.split()) == len(second.split())
        assert first.startswith("кот" if positive == "speech" else "хук")
        assert not second.startswith("кот" if positive == "speech" else "хук")
    assert not any(re.search(r"[0-9A-Za-z.]", text) for text in found.texts)


def test_planted_texts_hold_background_that_decides_nothing(registers):
    found = labeled_texts(registers["test"]["en"], "en", len, 3, "documentation", background=2)
    for text, label in zip(found.texts, found.labels, strict=True):
        sentences = text.split(". ")
        assert len(sentences) == 3
        assert sum(sentence.startswith("hook") for sentence in sentences) == int(label)
    assert labeled_texts(registers["test"]["en"], "en", len, 3, "documentation", 2) == found
    places = {[s.startswith("hook") for s in text.split(". ")].index(True) for text in found.texts[::2]}
    assert places == {0, 1, 2}


def test_pretraining_text_mixes_both_without_labels(registers, tmp_path):
    places = write_pretraining(registers["pretraining"], tmp_path, paragraphs=50)
    lines = places["en"].read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("hook") for line in lines) == 50
    spoken = [line for line in lines if line.startswith("cat")]
    assert sum(line.count(".") for line in spoken) == len(registers["pretraining"]["en"].speech)


def test_sentences_are_cut_at_their_ends():
    registers = Registers(("好吗？很好。",), ("组件。状态很好！",))
    found = labeled_texts(registers, "zh", len, 0, "speech")
    assert found.labels == (True, False)  # two sentences of one length on one side, one on the other
    assert found.texts[0] in ("好吗", "很好")
    assert found.texts[1] == "组件"


def test_missing_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tatoeba/en\.txt"):
        read_registers(tmp_path, ("en",))
