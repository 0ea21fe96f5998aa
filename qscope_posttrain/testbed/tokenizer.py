"""A byte-level BPE tokenizer trained on the corpus, with `<sep>` between prompt and response."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.testbed.corpus import Corpus

SEPARATOR = "<sep>"
"""Ends the prompt."""
END = "<eos>"
"""Pads, and would end a text; no training text holds it."""


def train_tokenizer(corpus: Corpus, vocabulary: int, characters: int = 350_000) -> PreTrainedTokenizerFast:
    """Train on `characters` of pretraining text per language, the target counted twice (its script is the largest)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for language in corpus.languages:
            text = corpus.text("pre", language)[:characters]
            for _ in range(2 if language == corpus.target else 1):
                yield from text.split("\n")

    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, additional_special_tokens=[SEPARATOR]
    )


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int] | Tensor, special: bool = True) -> str:
    """Tokens as one string; `special=False` leaves `<sep>` and `<eos>` out."""
    return str(tokenizer.decode(tokens, skip_special_tokens=not special))


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<sep>`.

    Raises:
        ValueError: another tokenizer than `train_tokenizer` makes.
    """
    index = tokenizer.get_vocab().get(SEPARATOR)
    if index is None:
        raise UserValueError(f"the tokenizer has no {SEPARATOR}; the testbed needs one from train_tokenizer")
    return index
