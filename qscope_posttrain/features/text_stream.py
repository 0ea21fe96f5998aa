"""Documents as token sequences of one length, with a position from which the stream can be read again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.batches import pad_token
from qscope_posttrain.features.text_source import TextSource

ISOLATED, JOINED, SEPARATE = "isolated", "joined", "separate"
PACKINGS = (ISOLATED, JOINED, SEPARATE)
_DOCUMENTS_PER_CALL = 256


@dataclass(frozen=True)
class StreamPosition:
    """Which token of the text comes next."""

    epoch: int = 0
    """How often the text has been read to its end"""
    document: int = 0
    """Number of the document within the source"""
    offset: int = 0
    """Its tokens that have been read"""
    digest: str = ""
    """SHA-256 chained over all documents before it, in the order in which they were read"""

    def after(self, document: str) -> StreamPosition:
        """The start of the next document."""
        own = hashlib.sha256(document.encode("utf-8", errors="surrogatepass")).digest()
        digest = hashlib.sha256(bytes.fromhex(self.digest) + own).hexdigest()
        return StreamPosition(self.epoch, self.document + 1, 0, digest)


@dataclass(frozen=True)
class PackedSequence:
    """Tokens of one or more documents."""

    ids: tuple[int, ...]
    """As many as the context length"""
    starts: tuple[int, ...]
    """Where a document, or a piece of one that was cut, begins; ascending, the first is 0"""
    used: int
    """Tokens before the padding"""
    end: StreamPosition
    """Where the next sequence begins"""

    def positions(self) -> list[int]:
        """Distance of each token to the start of its piece."""
        result, start = [], 0
        starts = set(self.starts)
        for place in range(len(self.ids)):
            start = place if place in starts else start
            result.append(place - start)
        return result


def packed_sequences(
    source: TextSource,
    tokenizer: Any,
    length: int,
    position: StreamPosition | None = None,
    packing: str = ISOLATED,
    first_document: int = 0,
) -> Iterator[PackedSequence]:
    """Sequences of `length` tokens without end: a text that ends is read again.

    A document gets the tokenizer's own special tokens. What does not fit into a sequence begins the next one, as a
    piece of its own. With packing "isolated" and "joined" the next document follows at once; what separates them is up
    to the forward pass. With "separate" a sequence holds one piece, and padding.

    Args:
        position: Where to begin: the start, or the `end` of a sequence of the same stream.
        first_document: Documents before this one are never read.

    Raises:
        ValueError: no document has a token.
    """
    at = StreamPosition() if position is None else position
    ids: list[int] = []
    starts: list[int] = []
    while True:
        at = replace(at, document=max(at.document, first_document))
        from_the_start, found = (at.document, at.offset) == (first_document, 0), False
        for text, tokens in _tokenised(source, tokenizer, at.document):
            while at.offset < len(tokens):
                found = True
                piece = tokens[at.offset : at.offset + length - len(ids)]
                starts.append(len(ids))
                ids += piece
                at = replace(at, offset=at.offset + len(piece))
                if len(ids) == length or packing == SEPARATE:
                    end = at.after(text) if at.offset == len(tokens) else at
                    padding = [pad_token(tokenizer)] * (length - len(ids))
                    yield PackedSequence(tuple(ids + padding), tuple(starts), len(ids), end)
                    ids, starts = [], []
            at = at.after(text)
        if from_the_start and not found:
            raise UserValueError(
                f"the text has no document with a token after the first {first_document}, which are held out."
            )
        at = StreamPosition(at.epoch + 1, first_document, 0, at.digest)


def _tokenised(source: TextSource, tokenizer: Any, first: int) -> Iterator[tuple[str, list[int]]]:
    group: list[str] = []
    for text in source.documents(first):
        group.append(text)
        if len(group) == _DOCUMENTS_PER_CALL:
            yield from zip(group, tokenizer(group, verbose=False)["input_ids"], strict=True)
            group = []
    if group:
        yield from zip(group, tokenizer(group, verbose=False)["input_ids"], strict=True)
