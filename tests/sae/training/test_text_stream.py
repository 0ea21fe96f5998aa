from __future__ import annotations

import json
from itertools import islice

import pytest
from datasets import Dataset

from qscope_posttrain.sae.training.text_stream import (
    dataset_source,
    file_source,
    list_source,
    open_source,
    packed_sequences,
)


class Letters:
    """A tokenizer with a token for each character."""

    pad_token_id = 0

    def __call__(self, texts, verbose):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


TEXTS = ["abcdefg", "", "hij", "k", "lmnopqrstu"]


def words(sequence) -> str:
    return "".join(chr(token) for token in sequence.ids if token)


def take(count: int, **options):
    return list(islice(packed_sequences(list_source(TEXTS), Letters(), 4, **options), count))


def test_nothing_is_lost_and_pieces_are_marked():
    found = take(6)
    assert [words(sequence) for sequence in found] == ["abcd", "efgh", "ijkl", "mnop", "qrst", "uabc"]
    assert [sequence.starts for sequence in found] == [(0,), (0, 3), (0, 2, 3), (0,), (0,), (0, 1)]
    assert found[1].positions() == [0, 1, 2, 0]
    assert [sequence.end.epoch for sequence in found] == [0] * 5 + [1]


def test_separate_documents_are_padded():
    found = take(4, packing="separate")
    assert [words(sequence) for sequence in found] == ["abcd", "efg", "hij", "k"]
    assert [sequence.used for sequence in found] == [4, 3, 3, 1]
    assert all(len(sequence.ids) == 4 and sequence.starts == (0,) for sequence in found)


@pytest.mark.parametrize("packing", ["isolated", "separate"])
@pytest.mark.parametrize("first_document", [0, 2])
def test_every_position_continues_the_same_stream(packing, first_document):
    whole = take(12, packing=packing, first_document=first_document)
    for number in range(11):
        rest = take(11 - number, packing=packing, first_document=first_document, position=whole[number].end)
        assert rest == whole[number + 1 :]


def test_held_out_documents_are_never_read():
    assert not set("abcdefghij") & set("".join(map(words, take(20, first_document=3))))


def test_digest_depends_on_documents_and_order():
    def digest(texts):
        return next(islice(packed_sequences(list_source(texts), Letters(), 4), 2, None)).end.digest

    assert digest(["abcd", "efgh", "ijkl"]) == digest(["abcd", "efgh", "ijkl", "mnop"])
    assert (
        len({digest(["abcd", "efgh", "ijkl"]), digest(["efgh", "abcd", "ijkl"]), digest(["abc", "defgh", "ijkl"])}) == 3
    )


def test_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no document with a token after the first 5"):
        take(1, first_document=5)


def test_sources_give_the_same_documents(tmp_path):
    texts = ["one", "two\u2028three", "four"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "b.txt").write_text("five\n\nsix\n", encoding="utf-8")
    table = Dataset.from_dict({"body": [*texts, "five", "six"], "other": [1] * 5})
    for source in (
        open_source([*texts, "five", "six"]),
        open_source(tmp_path, "body"),
        open_source(table, "body"),
        open_source(table.to_iterable_dataset(), "body"),
    ):
        assert list(source.documents()) == [*texts, "five", "six"]
        assert list(source.documents(3)) == ["five", "six"]
        assert list(source.documents(9)) == []


def test_sources_say_what_is_wrong(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: expected an object with the string 'text'"):
        list(file_source(tmp_path).documents())
    (tmp_path / "a.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        list(file_source(tmp_path).documents())
    with pytest.raises(FileNotFoundError, match="no text at"):
        file_source(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match=r"must be a \.txt file"):
        file_source(__file__)
    with pytest.raises(ValueError, match="no column 'text'"):
        dataset_source(Dataset.from_dict({"body": ["x"]}))
    with pytest.raises(TypeError, match="Dataset"):
        open_source(7)
