"""Where the documents of a long training come from: lists, files, or data sets that are read as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from qscope_posttrain.errors import UserFileNotFoundError, UserTypeError, UserValueError
from qscope_posttrain.files import check_is_file, read_lines, text_suffix
from qscope_posttrain.text.jsonl import parse_object


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
