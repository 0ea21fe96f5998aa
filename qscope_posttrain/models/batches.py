"""Turn texts by language into padded batches within a token budget, independent of the order of the texts."""

from __future__ import annotations

import hashlib
import operator
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.models.layers import text_config

TEXTS_PER_TOKENIZER_CALL = 1000
SHORTEST_SHARE = 0.75
"""A batch takes no sequence shorter than this share of its longest one: at most a quarter of it is padding."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """A text as token ids, of which only those from `start` on count: those before are their context."""

    ids: tuple[int, ...]
    start: int = 1  # Position of the first token that counts; the first token of a text never does

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(map(operator.index, self.ids)))
        if any(token < 0 for token in self.ids):
            raise UserValueError(f"Token ids cannot be negative, got {min(self.ids)}.")
        if not 1 <= self.start < max(len(self.ids), 2):
            raise UserValueError(
                f"start must lie between 1 and the last of the {len(self.ids)} tokens, so that at least one counts; "
                f"got {self.start}."
            )


Text = str | TokenText | Sequence[int]
"""A string, which the tokenizer encodes with its own special tokens, or token ids, which are read as they are."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One tokenized text."""

    language: int  # Index into the languages
    text: int  # Position among the texts of its language
    ids: tuple[int, ...]
    truncated: bool
    start: int = 1  # Position of the first token that counts; at the length or beyond, none does
    ignored: frozenset[int] = frozenset()
    """Token ids that never count, wherever they stand; they are read all the same, as context of the others"""

    @property
    def counted(self) -> int:
        """Number of tokens that count."""
        if not self.ignored:
            return max(len(self.ids) - self.start, 0)
        return sum(token not in self.ignored for token in self.ids[self.start :])

    def content_hash(self) -> bytes:
        """Depends on the token ids alone: not on the order of the texts, the language or the process."""
        return hashlib.sha256(array("q", self.ids).tobytes()).digest()


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded on the right, grouped by language. No attention mask is needed: under causal attention a token
    never sees what stands to its right. Tensors are made when they are read: a long pass holds all of its batches."""

    sequences: tuple[TokenSequence, ...]
    pad_id: int

    @property
    def lengths(self) -> Tensor:
        """[batch] int64"""
        return torch.tensor([len(sequence.ids) for sequence in self.sequences])

    @property
    def input_ids(self) -> Tensor:
        """[batch, length] int64, on the CPU; positions at and beyond `lengths` are padding."""
        longest = max(len(sequence.ids) for sequence in self.sequences)
        return torch.tensor([one.ids + (self.pad_id,) * (longest - len(one.ids)) for one in self.sequences])

    def positions(self) -> Tensor:
        """[tokens] int64: indices into the flattened [batch * length] grid, in order, of the tokens that count."""
        lengths = self.lengths
        column = torch.arange(int(lengths.max()))
        start = torch.tensor([sequence.start for sequence in self.sequences])
        counts = (column >= start[:, None]) & (column < lengths[:, None])
        for row, sequence in enumerate(self.sequences):
            if sequence.ignored:
                ids = torch.tensor(sequence.ids)
                counts[row, : len(ids)] &= ~torch.isin(ids, torch.tensor(sorted(sequence.ignored)))
        return counts.flatten().nonzero().squeeze(1)


def check_texts(texts: Mapping[str, Sequence[Text]]) -> tuple[str, ...]:
    """Return the languages of `texts`; TypeError or ValueError when it is not {language: non-empty list of `Text`}."""
    if not isinstance(texts, Mapping):
        raise UserTypeError(f'texts must be a mapping like {{"zh": [...], "en": [...]}}, got {type(texts).__name__}.')
    if not texts:
        raise UserValueError("texts is empty: give at least one language with at least one text.")
    for language, lines in texts.items():
        if not isinstance(language, str):
            raise UserTypeError(f"Languages must be strings, got {language!r}.")
        if isinstance(lines, str) or not isinstance(lines, Sequence):
            raise UserTypeError(
                f"texts[{language!r}] must be a list of strings or token ids, got {type(lines).__name__}."
            )
        if len(lines) == 0:
            raise UserValueError(f"Language {language!r} has no texts; remove it or give it some.")
        for line in lines:
            if isinstance(line, (str, TokenText)):
                continue
            if isinstance(line, bytes) or not isinstance(line, Sequence):
                kind = type(line).__name__
                raise UserTypeError(f"texts[{language!r}] must hold strings or lists of token ids, got {kind}.")
            wrong = [token for token in line if isinstance(token, bool) or not isinstance(token, int)]
            if wrong:
                raise UserTypeError(f"texts[{language!r}] holds a list with {wrong[0]!r} in it, which is no token id.")
    return tuple(texts)


def describe_text(text: Text) -> str:
    """Identify a text by a string, for `provenance.text_fingerprint`: itself, or its ids and where they count."""
    if isinstance(text, str):
        return text
    known = text if isinstance(text, TokenText) else TokenText(tuple(text))
    return f"token ids from {known.start}: {' '.join(map(str, known.ids))}"


def tokenize_texts(
    tokenizer: Any, texts: Mapping[str, Sequence[Text]], max_length: int, ignored: Collection[int] = ()
) -> list[TokenSequence]:
    """Tokenize all texts, each cut after `max_length` tokens; strings get the tokenizer's own special tokens. Texts
    without a token are left out. The language index of a sequence counts in the order of `texts`. Tokens whose ids are
    `ignored` never count."""
    if not callable(tokenizer):
        raise UserTypeError(f"Expected a tokenizer of transformers, got {type(tokenizer).__name__}.")
    if max_length < 2:
        raise UserValueError(f"max_length must be at least 2 (a text's first token never counts), got {max_length}.")
    sequences: list[TokenSequence] = []
    left_out = frozenset(ignored)
    known: dict[int, int] = {}  # One object per token id: 8 bytes a token instead of 40
    for index, language in enumerate(check_texts(texts)):
        found = [
            TokenSequence(index, number, ids, len(text.ids) > max_length, text.start, left_out)
            for number, text in enumerate(_token_texts(tokenizer, texts[language]))
            if (ids := tuple(known.setdefault(token, token) for token in text.ids[:max_length]))
        ]
        if all(sequence.counted == 0 for sequence in found):
            raise UserValueError(
                f"Language {language!r} has no text of at least two tokens"
                + (f", or none that counts before token {max_length}." if any(s.truncated for s in found) else ".")
                + (f" {len(left_out)} token ids are ignored." if left_out else "")
            )
        sequences += found
    return sequences


def _token_texts(tokenizer: Any, texts: Sequence[Text]) -> Iterator[TokenText]:
    for start in range(0, len(texts), TEXTS_PER_TOKENIZER_CALL):
        part = texts[start : start + TEXTS_PER_TOKENIZER_CALL]
        lines = [text for text in part if isinstance(text, str)]
        # verbose=False: a text beyond the model's length is cut by us, not worth the tokenizer's warning
        encoded = tokenizer(lines, verbose=False) if lines else {"input_ids": []}
        if "input_ids" not in encoded:
            raise UserTypeError(f"{type(tokenizer).__name__} returns no input_ids, got {list(encoded)}.")
        ids = iter(encoded["input_ids"])
        for text in part:
            known = next(ids) if isinstance(text, str) else text
            yield known if isinstance(known, TokenText) else TokenText(tuple(known))


def token_batches(sequences: Sequence[TokenSequence], tokens_per_batch: int, pad_id: int = 0) -> list[TokenBatch]:
    """Form batches of similar length, longest first, with at most `tokens_per_batch` tokens including padding. A longer
    sequence gets a batch of its own; much shorter ones (see `SHORTEST_SHARE`) share none with it. The batches depend on
    the set of sequences, not on their order. Within a batch the sequences of a language are neighbors."""
    if tokens_per_batch < 1:
        raise UserValueError(f"tokens_per_batch must be positive, got {tokens_per_batch}.")
    ordered = sorted(sequences, key=lambda one: (-len(one.ids), one.ids, one.language, one.text))
    batches: list[TokenBatch] = []
    start = 0
    while start < len(ordered):
        longest = len(ordered[start].ids)
        stop = min(start + max(1, tokens_per_batch // longest), len(ordered))
        while len(ordered[stop - 1].ids) < SHORTEST_SHARE * longest:
            stop -= 1
        chosen = sorted(ordered[start:stop], key=operator.attrgetter("language"))
        batches.append(TokenBatch(tuple(chosen), pad_id))
        start = stop
    return batches


def longest_allowed(model: nn.Module, max_length: int) -> int:
    """`max_length`, or the number of positions of the model if that is smaller."""
    positions = getattr(text_config(model), "max_position_embeddings", None)
    return min(max_length, positions) if positions else max_length


def pad_token(tokenizer: Any) -> int:
    """The id for padding: any valid one will do, because padding is never read."""
    pad_id = getattr(tokenizer, "pad_token_id", None)
    return 0 if pad_id is None else int(pad_id)


def input_device(model: nn.Module) -> torch.device:
    """Device of the first parameter, where the token ids have to be."""
    return next(model.parameters()).device
