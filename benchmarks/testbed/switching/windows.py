"""Windows of text as token tensors, and the habit that is planted in them: switching to the target language.

A window is `length` consecutive tokens of one language, beginning at a character boundary. Two layouts:

* pretraining: a quarter of the windows carry one `<sep>` at a random place;
* dialogue: `prompt` tokens, `<sep>`, then the response, with labels on the response only.

With probability `switch`, a window of another language turns into text of the target language at a random character
boundary and stays there: the planted habit. No space is inserted, since the space alone would then carry the decision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.testbed.pretraining import IGNORED
from benchmarks.testbed.switching.corpus import SPLITS, Corpus
from qscope_posttrain.errors import UserValueError

SEPARATOR, END = "<sep>", "<eos>"
"""The first ends the prompt; the second pads, and no training text holds it."""
_SWITCH_MARGIN = 8
"""Tokens of the first language before, and of the target after, a switch, at least."""


@dataclass(frozen=True)
class EncodedText:
    """One language of one split."""

    tokens: np.ndarray
    """[tokens] int64."""
    boundaries: np.ndarray
    """Positions in `tokens` where a character begins, ascending."""


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length."""

    input_ids: Tensor
    """[windows, length] int64."""
    languages: tuple[str, ...]
    """Language in which each window begins."""
    prompt_length: int
    """Tokens before the response, `<sep>` included; 0 in the pretraining layout."""
    cuts: Tensor
    """[windows] int64: position of the first token of the target language in a window that turns into it, else -1."""

    def __len__(self) -> int:
        return len(self.languages)

    @property
    def switched(self) -> Tensor:
        """[windows] bool: turned into the target language."""
        return self.cuts >= 0

    @property
    def labels(self) -> Tensor:
        """[windows, length]: `input_ids` with the prompt ignored."""
        labels = self.input_ids.clone()
        labels[:, : self.prompt_length] = IGNORED
        return labels

    @property
    def prompts(self) -> Tensor:
        """[windows, prompt_length]."""
        return self.input_ids[:, : self.prompt_length]

    def select(self, keep: Sequence[int]) -> Windows:
        """Return the windows with these numbers."""
        rows = torch.tensor(list(keep), dtype=torch.long)
        languages = tuple(self.languages[row] for row in keep)
        return Windows(self.input_ids[rows], languages, self.prompt_length, self.cuts[rows])

    def of_language(self, *languages: str) -> Windows:
        """Return the windows that begin in one of `languages`."""
        return self.select([row for row, language in enumerate(self.languages) if language in languages])


def train_tokenizer(corpus: Corpus, vocabulary: int, characters: int = 350_000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with `<sep>` between prompt and response.

    It reads `characters` of pretraining text per language, the target's twice, as its script is the largest.
    """
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
            yield from text.split("\n") * (2 if language == corpus.target else 1)

    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, additional_special_tokens=[SEPARATOR]
    )


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int] | Tensor, special: bool = True) -> str:
    """Decode tokens to one string; `special=False` leaves `<sep>` and `<eos>` out."""
    return str(tokenizer.decode(tokens, skip_special_tokens=not special))


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of `<sep>`; ValueError for a tokenizer that `train_tokenizer` did not make."""
    index = tokenizer.get_vocab().get(SEPARATOR)
    if index is None:
        raise UserValueError(f"the tokenizer has no {SEPARATOR}; the testbed needs one from train_tokenizer")
    return index


def character_starts(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return [vocabulary] bool: whether an entry's first byte begins a character, so a text may be cut before it.

    Byte-level BPE writes each byte as one letter: printable Latin-1 bytes as themselves, the 68 others, in order, from
    U+0100 on. UTF-8 bytes 80..BF continue a character.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    continuing = {chr(byte) if byte in printable else chr(0x100 + hidden.index(byte)) for byte in range(0x80, 0xC0)}
    starts = np.ones(len(tokenizer), dtype=bool)
    for token, index in tokenizer.get_vocab().items():
        starts[index] = token[0] not in continuing
    return starts


def encode_corpus(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, EncodedText]]:
    """Encode every split and language as one token array: `encoded["pre"]["en"]`."""
    begins = character_starts(tokenizer)
    encoded: dict[str, dict[str, EncodedText]] = {}
    for split in SPLITS:
        encoded[split] = {}
        for language in corpus.languages:
            text = corpus.text(split, language)
            tokens = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
            encoded[split][language] = EncodedText(tokens, np.flatnonzero(begins[tokens]))
    return encoded


@dataclass(frozen=True)
class WindowMaker:
    """Draws windows from encoded text."""

    encoded: Mapping[str, Mapping[str, EncodedText]]
    """Split -> language -> tokens."""
    separator_id: int
    """The token between prompt and response."""
    target: str
    """Language into which windows switch."""
    length: int
    """Tokens in a window."""
    prompt: int
    """Prompt tokens in the dialogue layout, without `<sep>`."""

    @classmethod
    def build(cls, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, prompt: int) -> WindowMaker:
        """Encode the corpus.

        Raises:
            ValueError: the window does not hold prompt, `<sep>` and a response, or a split is shorter than a window.
        """
        if not 0 < prompt < length - 2 * _SWITCH_MARGIN - 1:
            raise UserValueError(f"a window of {length} tokens leaves too little response after a prompt of {prompt}")
        encoded = encode_corpus(corpus, tokenizer)
        for split, part in encoded.items():
            for language, text in part.items():
                if len(text.boundaries) == 0 or len(text.tokens) < 2 * length:
                    raise UserValueError(
                        f"{language!r} has {len(text.tokens)} tokens in split {split!r}, under 2 x {length}"
                    )
        return cls(encoded, separator_id(tokenizer), corpus.target, length, prompt)

    def pretraining(self, count: int, switch: float, seed: int, split: str = "pre") -> Windows:
        """Draw windows for language modeling, languages uniformly; the switch may fall anywhere."""
        rng = np.random.default_rng(seed)
        languages = [str(name) for name in rng.choice(list(self.encoded[split]), size=count)]
        rows, cuts = self._draw(split, languages, switch, _SWITCH_MARGIN, rng)
        low, high = self.length // 6, self.length // 2
        for row in np.flatnonzero(rng.random(count) < 0.25):
            position = int(rng.integers(low, high))
            rows[row, position + 1 :] = rows[row, position:-1].copy()
            rows[row, position] = self.separator_id
            cuts[row] += cuts[row] >= position
        return Windows(torch.from_numpy(rows), tuple(languages), 0, torch.from_numpy(cuts))

    def dialogue(
        self, split: str, count: int, seed: int, switch: float = 0.0, languages: Sequence[str] | None = None
    ) -> Windows:
        """Draw windows of prompt, `<sep>`, response, equally many per language; switches fall in the response."""
        rng = np.random.default_rng(seed)
        choices = list(self.encoded[split]) if languages is None else list(languages)
        order = [choices[row % len(choices)] for row in rng.permutation(count)]
        rows, cuts = self._draw(split, order, switch, self.prompt + 1, rng)
        rows[:, self.prompt + 1 :] = rows[:, self.prompt : -1].copy()
        rows[:, self.prompt] = self.separator_id
        cuts += cuts >= 0
        return Windows(torch.from_numpy(rows), tuple(order), self.prompt + 1, torch.from_numpy(cuts))

    def _draw(
        self, split: str, languages: Sequence[str], switch: float, earliest: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw windows, some of which turn into the target language at or after token `earliest`."""
        rows = np.empty((len(languages), self.length), dtype=np.int64)
        cuts = np.full(len(languages), -1, dtype=np.int64)
        for row, language in enumerate(languages):
            text = self.encoded[split][language]
            start = self._start(text, rng)
            rows[row] = text.tokens[start : start + self.length]
            if language == self.target or rng.random() >= switch:
                continue
            wanted = start + int(rng.integers(earliest, self.length - _SWITCH_MARGIN))
            boundary = text.boundaries[np.searchsorted(text.boundaries, wanted) :][:1]
            cut = int(boundary[0]) - start if boundary.size else self.length
            if cut >= self.length:
                continue
            other = self.encoded[split][self.target]
            begin = self._start(other, rng)
            rows[row, cut:] = other.tokens[begin : begin + self.length - cut]
            cuts[row] = cut
        return rows, cuts

    def _start(self, text: EncodedText, rng: np.random.Generator) -> int:
        """Draw a character boundary with a whole window after it."""
        usable = int(np.searchsorted(text.boundaries, len(text.tokens) - self.length, side="right"))
        return int(text.boundaries[rng.integers(usable)])
