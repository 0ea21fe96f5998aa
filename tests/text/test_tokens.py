"""Vocabulary entries by script, for tokenizers that cut text into bytes and for those that do not."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qscope_posttrain.text.scripts import contains_script
from qscope_posttrain.text.tokens import _beginnings, _byte_alphabet, _bytes_write, script_token_ids

MAIN_LEADS = {
    "Han": range(0xE4, 0xEA),
    "Cyrillic": range(0xD0, 0xD4),
    "Hangul": range(0xEA, 0xEE),
    "Thai": range(0xE0, 0xE1),
    "Latin": range(0),
}


@pytest.mark.parametrize("script", MAIN_LEADS)
def test_lead_bytes(script):
    assert {beginning[0] for beginning in _beginnings(script)} == set(MAIN_LEADS[script])


def test_byte_alphabet_is_that_of_the_tokenizers_library():
    assert sorted(_byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("你好 мир\n\t\x7f\xa0\xad", "강물 é 😀"):
        (piece, _), *rest = splitter.pre_tokenize_str(text)
        assert not rest
        assert bytes(map(_byte_alphabet().__getitem__, piece)) == text.encode()


@pytest.mark.parametrize(
    ("piece", "script", "expected"),
    [
        ("中".encode(), "Han", True),
        (b" " + "中".encode()[:1], "Han", True),
        ("中".encode()[:2], "Han", True),
        ("中".encode()[1:], "Han", False),  # continues any character
        ("中".encode()[2:] + "文".encode()[:1], "Han", True),
        ("㐀".encode(), "Han", True),  # extension A, whole
        ("㐀".encode()[:1], "Han", False),  # E3: kana, CJK punctuation
        ("。，".encode(), "Han", False),
        ("。".encode()[:2], "Han", False),
        ("か".encode()[:2], "Hiragana", True),
        ("か".encode()[:2], "Katakana_Or_Hiragana", True),
        ("ラ".encode(), "Katakana_Or_Hiragana", True),
        (b"\xe3", "Katakana_Or_Hiragana", False),  # CJK punctuation as well
        ("。".encode()[:2], "Katakana_Or_Hiragana", False),
        ("。中".encode(), "Katakana_Or_Hiragana", False),
        (b"\xea", "Hangul", True),
        (b"\xea\x80", "Hangul", False),  # Yi
        (b"\xed\x9e", "Hangul", True),
        (b"\xd0", "Cyrillic", True),
        (b"\xd4", "Cyrillic", False),  # Armenian and a supplement
        ("я".encode(), "Cyrillic", True),
        (b"\xf0\xa0", "Han", False),
        ("𠀀".encode(), "Han", True),
        (b"\xe4A", "Han", False),  # interrupted: writes nothing
        (b"abc", "Latin", True),
        (b"", "Han", False),
        (b"\xb8\xad\xe6\x96\x87\xe5", "Han", True),
    ],
)
def test_byte_strings(piece, script, expected):
    assert _bytes_write(piece, script) is expected


def test_byte_level_vocabulary(tiny_tokenizer):
    """Equal to the testbed's rule, any byte E4..E9, written out here from the tokenizer's own alphabet."""
    leads = {character for character, byte in _byte_alphabet().items() if 0xE4 <= byte <= 0xE9}
    special = set(tiny_tokenizer.all_special_ids) | set(tiny_tokenizer.added_tokens_decoder)
    expected = sorted(
        index for piece, index in tiny_tokenizer.get_vocab().items() if index not in special and leads & set(piece)
    )
    ids = script_token_ids(tiny_tokenizer, "Han")
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected
    assert len(expected) > 6


@pytest.mark.parametrize("script", ["Han", "Hangul", "Cyrillic"])
def test_every_character_of_the_script_needs_one_of_the_tokens_and_other_text_none(tiny_tokenizer, script, texts):
    ids = set(script_token_ids(tiny_tokenizer, script).tolist())
    for lines in texts.values():
        for line in lines:
            for character in line:
                used = set(tiny_tokenizer(character, add_special_tokens=False)["input_ids"])
                assert bool(used & ids) == contains_script(character, script), character


def test_special_and_added_tokens(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|中文|>"]})
    tokenizer.add_tokens([AddedToken("中国", special=False), "plain"])
    ids = set(script_token_ids(tokenizer, "Han").tolist())
    assert tokenizer.convert_tokens_to_ids("中国") in ids
    assert tokenizer.convert_tokens_to_ids("<|中文|>") not in ids
    assert tokenizer.convert_tokens_to_ids("plain") not in ids


def test_sentencepiece_like_vocabulary():
    pieces = ["<pad>", "▁the", "▁中国", "人", "。", "кот", "▁3"]
    vocabulary = [(piece, 0.0) for piece in pieces] + [(f"<0x{byte:02X}>", -10.0) for byte in range(256)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    first_byte = len(pieces)
    assert script_token_ids(tokenizer, "Han").tolist() == [2, 3, *range(first_byte + 0xE4, first_byte + 0xEA)]
    assert script_token_ids(tokenizer, "Cyrillic").tolist() == [5, *range(first_byte + 0xD0, first_byte + 0xD4)]


def test_word_vocabulary_without_the_script_gives_no_ids():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1, "кот": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert script_token_ids(tokenizer, "Han").shape == (0,)
    assert script_token_ids(tokenizer, "Cyrillic").tolist() == [2]
    assert script_token_ids(tokenizer, "Latin").tolist() == [1]


def test_unknown_script_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="not a Unicode script"):
        script_token_ids(tiny_tokenizer, "Klingon")
    with pytest.raises(ValueError, match="No main Unicode block"):
        script_token_ids(tiny_tokenizer, "Yi")


def test_wordpiece():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "中": 1, "##国": 2, "##s": 3}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert script_token_ids(tokenizer, "Han").tolist() == [1, 2]


def test_merged_fragments_of_a_trained_vocabulary(shared_data):
    """On real Chinese, every Han character costs one of the tokens, at its beginning."""
    lines = (shared_data / "tatoeba" / "zh.txt").read_text(encoding="utf-8").splitlines()[:1500]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = set(script_token_ids(tokenizer, "Han").tolist())
    for line in lines[:300]:
        used = tokenizer(line, add_special_tokens=False)["input_ids"]
        assert bool(ids & set(used)) == contains_script(line, "Han")
