"""A tokenizer of whole words: every symbol of the task is one token, and text and tokens turn into each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qscope_posttrain.testbed.arithmetic.task import ANSWER, BEGIN, END, MODULUS, OPERATORS, PAD, SEPARATOR

SPECIAL = (PAD, BEGIN, END, SEPARATOR)
VOCABULARY = (*SPECIAL, *map(str, range(MODULUS)), *OPERATORS, "=", ";", "take", ",", "get", "so", "is", ANSWER)
"""All tokens; a token's id is its place."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words separated by spaces, nothing added at either end: prompts carry `<bos>` and `<sep>` in their text.

    A word outside of the vocabulary is left out by the tokenizer's model, as there is no token for unknown words.
    """
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[SEPARATOR],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode_words(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[int]:
    """The ids of words. KeyError for a word that is no token."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[word] for word in words]


def decode_words(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """The words of ids, special tokens included."""
    return [str(word) for word in tokenizer.convert_ids_to_tokens(list(tokens))]
