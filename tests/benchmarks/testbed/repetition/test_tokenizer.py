"""Whole-word tokens, from text as TRL makes them and back."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from benchmarks.testbed.repetition.task import (
    SPECIAL,
    VOCABULARY,
    build_tokenizer,
    decode_words,
    encode_words,
)

TOKENIZER = build_tokenizer()


def test_a_prompt_as_text_is_its_words() -> None:
    words = ["<bos>", "0", "+", "8", "*", "4", "-", "7", "<sep>"]
    # TRL calls the tokenizer exactly so for prompts that are strings.
    ids = TOKENIZER(text=[" ".join(words)])["input_ids"][0]
    assert ids == [VOCABULARY.index(word) for word in words]
    assert TOKENIZER.decode(ids) == " ".join(words)


@given(st.lists(st.sampled_from(VOCABULARY), max_size=40))
def test_text_and_tokens_turn_into_each_other(words: list[str]) -> None:
    text = " ".join(words)
    ids = TOKENIZER(text)["input_ids"]
    assert ids == encode_words(TOKENIZER, words)
    assert TOKENIZER.decode(ids) == text
    assert decode_words(TOKENIZER, ids) == words
    plain = [word for word in words if word not in SPECIAL]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == " ".join(plain)


def test_special_tokens_and_saving(tmp_path: Path) -> None:
    assert (TOKENIZER.pad_token, TOKENIZER.bos_token, TOKENIZER.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert len(TOKENIZER) == len(VOCABULARY)
    TOKENIZER.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again("<bos> 3 , get <sep>").input_ids == TOKENIZER("<bos> 3 , get <sep>").input_ids
    padded = again(["1", "1 + 2"], padding=True)["input_ids"]
    assert padded[0][:2] == [TOKENIZER.pad_token_id] * 2
