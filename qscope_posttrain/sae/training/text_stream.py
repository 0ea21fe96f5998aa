"""Documents as token sequences of one length, with a position from which the stream can be read again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from qscope_posttrain.errors import UserFileNotFoundError, UserTypeError, UserValueError
from qscope_posttrain.files import check_is_file, read_lines, text_suffix
from qscope_posttrain.models.batches import pad_token
from qscope_posttrain.text.jsonl import parse_object

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


class TextSource(Protocol):
    """Documents in a fixed order, which can be read again from any of them on."""

    def documents(self, skip: int = 0) -> Iterator[str]:
        """The documents from number `skip` on, once through."""

    def describe(self) -> dict[str, Any]:
        """JSON-able: what a model card says of the data, and what must agree for a training to go on."""


class ListSource:
    """Documents in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserTypeError("texts must be a list of strings, one a document")
        self.texts = list(texts)

    def documents(self, skip: int = 0) -> Iterator[str]:
        return iter(self.texts[skip:])

    def describe(self) -> dict[str, Any]:
        return {"kind": "list", "documents": len(self.texts)}


class FileSource:
    """Files in the order of their names: in `.txt` a document is a line, in `.jsonl` it is the field `column` of one.

    Lines without text are left out.
    """

    def __init__(self, path: str | Path, column: str = "text") -> None:
        location = Path(path)
        self.path, self.column = location, column
        self.files = sorted(f for f in location.rglob("*") if _readable(f)) if location.is_dir() else [location]
        if not self.files:
            raise UserFileNotFoundError(f"no .txt and no .jsonl file below '{location}'.")
        for file in self.files:
            check_is_file(file, "text")
        if not _readable(self.files[0]):
            raise UserValueError(
                f"'{location}' must be a .txt file (a document a line), a .jsonl file, or a folder of them."
            )

    def documents(self, skip: int = 0) -> Iterator[str]:
        return islice(self._all(), skip, None)

    def describe(self) -> dict[str, Any]:
        return {"kind": "files", "path": str(self.path), "files": len(self.files), "column": self.column}

    def _all(self) -> Iterator[str]:
        for file in self.files:
            for number, line in enumerate(read_lines(file), start=1):
                if line.strip():
                    yield line.strip() if text_suffix(file) == ".txt" else self._field(line, f"{file}, line {number}")

    def _field(self, line: str, place: str) -> str:
        row = parse_object(line, place)
        text = row.get(self.column)
        if not isinstance(text, str):
            raise UserValueError(f"{place}: expected an object with the string '{self.column}', got {sorted(row)}.")
        return text


class DatasetSource:
    """A `datasets.Dataset` or `IterableDataset` (`streaming=True`), of which one column holds the documents."""

    def __init__(self, dataset: Any, column: str = "text", name: str = "") -> None:
        for method in ("skip", "select_columns"):
            if not hasattr(dataset, method):
                raise UserTypeError(
                    f"expected a Dataset or IterableDataset of `datasets`, got {type(dataset).__name__}"
                )
        names = dataset.column_names
        if names is not None and column not in names:
            raise UserValueError(
                f"the data set has no column '{column}', but {', '.join(names)}: name one with text_column."
            )
        self.dataset, self.column, self.name = dataset.select_columns([column]) if names else dataset, column, name

    def documents(self, skip: int = 0) -> Iterator[str]:
        if hasattr(self.dataset, "__len__") and skip >= len(self.dataset):
            return
        for row in self.dataset.skip(skip) if skip else self.dataset:
            text = row[self.column]
            if not isinstance(text, str):
                raise UserValueError(f"column '{self.column}' must hold strings, got {type(text).__name__}.")
            yield text

    def describe(self) -> dict[str, Any]:
        return {"kind": "dataset", "name": self.name, "column": self.column}


def open_source(texts: Any, column: str = "text") -> TextSource:
    """A source from a list of strings, a path, a data set of `datasets`, or a source."""
    if isinstance(texts, str | Path):
        return FileSource(texts, column)
    if hasattr(texts, "documents") and hasattr(texts, "describe"):
        source: TextSource = texts
        return source
    return ListSource(texts) if isinstance(texts, Sequence) else DatasetSource(texts, column)


def _readable(file: Path) -> bool:
    return text_suffix(file) in (".txt", ".jsonl") and file.name[0] != "."
