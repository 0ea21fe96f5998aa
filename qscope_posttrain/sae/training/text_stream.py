"""Turn documents into token sequences of one length, with a position from which the stream can be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserFileNotFoundError, UserTypeError, UserValueError
from qscope_posttrain.files import check_is_file, parse_object, read_lines, text_suffix
from qscope_posttrain.models.batches import pad_token
from qscope_posttrain.sae.training.config import ISOLATED, SEPARATE

_DOCUMENTS_PER_CALL = 256


@dataclass(frozen=True)
class StreamPosition:
    """The next token of the text."""

    epoch: int = 0  # Number of times that the text has been read to its end
    document: int = 0  # Number of the document in the source
    offset: int = 0  # Number of its tokens that have been read
    digest: str = ""  # SHA-256 chained over all documents before it, in reading order

    def after(self, document: str) -> StreamPosition:
        """The start of the next document."""
        own = hashlib.sha256(document.encode("utf-8", errors="surrogatepass")).digest()
        digest = hashlib.sha256(bytes.fromhex(self.digest) + own).hexdigest()
        return StreamPosition(self.epoch, self.document + 1, 0, digest)


@dataclass(frozen=True)
class PackedSequence:
    """Tokens of one or more documents."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]  # Positions where a document, or a piece of one, begins; the first is 0
    used: int  # Number of tokens before the padding
    end: StreamPosition  # Start of the next sequence

    def positions(self) -> list[int]:
        """Distance of each token to the start of its piece."""
        bounds = [*self.starts, len(self.ids)]
        return [place for first, last in pairwise(bounds) for place in range(last - first)]

    def counted(self) -> list[bool]:
        """Whether each token counts: it is neither the first of a piece nor padding."""
        return [at > 0 and place < self.used for place, at in enumerate(self.positions())]


def packed_sequences(
    source: TextSource,
    tokenizer: Any,
    length: int,
    position: StreamPosition | None = None,
    packing: str = ISOLATED,
    first_document: int = 0,
) -> Iterator[PackedSequence]:
    """Endless sequences of `length` tokens from `position` on: at its end, the text is read again.

    A document gets the tokenizer's own special tokens. The rest of a document that does not fit into a sequence begins
    the next one, as a piece of its own. With packing "isolated" and "joined" the next document follows immediately, and
    the forward pass separates them or not. With "separate" a sequence holds one piece, and padding. Documents before
    `first_document` are never read.
    """
    at = StreamPosition() if position is None else position
    ids: list[int] = []
    starts: list[int] = []
    while True:
        at = replace(at, document=max(at.document, first_document))
        from_the_start, found = (at.document, at.offset) == (first_document, 0), False
        for text, tokens in _tokenized(source, tokenizer, at.document):
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


def _tokenized(source: TextSource, tokenizer: Any, first: int) -> Iterator[tuple[str, list[int]]]:
    documents = source.documents(first)
    while group := list(islice(documents, _DOCUMENTS_PER_CALL)):
        yield from zip(group, tokenizer(group, verbose=False)["input_ids"], strict=True)


@dataclass(frozen=True)
class TextSource:
    """Documents in a fixed order, which can be read again, starting from any of them."""

    documents: Callable[..., Iterator[str]]  # documents(skip=0): those from number `skip` on, once
    facts: dict[str, Any]  # For the model card, JSON-able; they must agree when a training is resumed


def open_source(texts: Any, column: str = "text") -> TextSource:
    """A source from a list of strings, a path, a data set of `datasets`, or a source."""
    if isinstance(texts, TextSource):
        return texts
    if isinstance(texts, str | Path):
        return file_source(texts, column)
    return list_source(texts) if isinstance(texts, Sequence) else dataset_source(texts, column)


def list_source(texts: Sequence[str]) -> TextSource:
    """Documents in memory."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UserTypeError("texts must be a list of strings, one per document")
    kept = list(texts)
    return TextSource(lambda skip=0: iter(kept[skip:]), {"kind": "list", "documents": len(kept)})


def file_source(path: str | Path, column: str = "text") -> TextSource:
    """Files in the order of their names. A document is a line of a `.txt` file, or the field `column` of a line of a
    `.jsonl` file. Blank lines are left out."""
    location = Path(path)
    files = sorted(f for f in location.rglob("*") if _readable(f)) if location.is_dir() else [location]
    if not files:
        raise UserFileNotFoundError(f"no .txt and no .jsonl file below '{location}'.")
    for file in files:
        check_is_file(file, "text")
    if not _readable(files[0]):
        raise UserValueError(
            f"'{location}' must be a .txt file (one document per line), a .jsonl file, or a folder of them."
        )

    def documents(skip: int = 0) -> Iterator[str]:
        lines = ((f, n, line) for f in files for n, line in enumerate(read_lines(f), start=1) if line.strip())
        return islice((_document(*found, column) for found in lines), skip, None)

    return TextSource(documents, {"kind": "files", "path": str(location), "files": len(files), "column": column})


def dataset_source(dataset: Any, column: str = "text", name: str = "") -> TextSource:
    """One column of a `datasets.Dataset` or `IterableDataset` (`streaming=True`)."""
    if not (hasattr(dataset, "skip") and hasattr(dataset, "select_columns")):
        raise UserTypeError(f"expected a Dataset or IterableDataset of `datasets`, got {type(dataset).__name__}")
    names = dataset.column_names
    if names is not None and column not in names:
        raise UserValueError(
            f"the data set has no column '{column}', but {', '.join(names)}: name one with text_column."
        )
    rows = dataset.select_columns([column]) if names else dataset

    def documents(skip: int = 0) -> Iterator[str]:
        if hasattr(rows, "__len__") and skip >= len(rows):
            return
        for row in rows.skip(skip) if skip else rows:
            if not isinstance(text := row[column], str):
                raise UserValueError(f"column '{column}' must hold strings, got {type(text).__name__}.")
            yield text

    return TextSource(documents, {"kind": "dataset", "name": name, "column": column})


def _document(file: Path, number: int, line: str, column: str) -> str:
    if text_suffix(file) == ".txt":
        return line.strip()
    place = f"{file}, line {number}"
    row = parse_object(line, place)
    if not isinstance(text := row.get(column), str):
        raise UserValueError(f"{place}: expected an object with the string '{column}', got {sorted(row)}.")
    return text


def _readable(file: Path) -> bool:
    return text_suffix(file) in (".txt", ".jsonl") and file.name[0] != "."
