"""Read data sets with `datasets`, and turn its errors into words that a user can act on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from qscope_posttrain.errors import UserError, UserFileNotFoundError, UserValueError
from qscope_posttrain.files import check_is_file, check_plain, read_csv, text_suffix
from qscope_posttrain.text.jsonl import read_json, read_jsonl

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Suffix of a local file (see `files.text_suffix`) -> the reader of `datasets`."""
_HEAD = 1000
"""Lines of a stream that are checked beforehand."""


def read_data_set(*arguments: Any, **options: Any) -> Any:
    """Call `datasets.load_dataset`. Raises as `reading` does."""
    from datasets import load_dataset

    with reading(str(arguments[0])):
        return load_dataset(*arguments, **options)


def read_file(path: str | os.PathLike[str], split: str = "train", streaming: bool = False, what: str = "file") -> Any:
    """Read a local file in one of the formats of READERS as the data set {split: rows}."""
    from datasets import load_dataset

    place = check_data_file(path, streaming, what)
    options: dict[str, Any] = {"sep": "\t"} if text_suffix(place) == ".tsv" else {}
    with reading(str(place), place):
        kind = READERS[text_suffix(place)]
        if kind == "json":
            options["encoding"] = "utf-8-sig"  # older versions do not take a byte order mark before a list
        found = load_dataset(kind, data_files={split: str(place)}, streaming=streaming, **options)
        next(iter(found[split]))
    return found


def saved_data_set(folder: str | os.PathLike[str]) -> Any:
    """Read what `save_to_disk` wrote into `folder`: rows, or rows by split. None if nothing, ValueError if damaged."""
    from datasets import load_from_disk

    place = Path(folder)
    if not any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    with reading(str(place)):
        return load_from_disk(str(place))


def read_splits(
    source: str, split: str = "train", config: str | None = None, streaming: bool = False, what: str = "file"
) -> Mapping[Any, Any]:
    """{split: rows} of a file, of a folder written by `save_to_disk`, or of a data set of the hub.

    Args:
        split: Name of the rows that come without one.
        config: Configuration of a data set of the hub.
    """
    if text_suffix(source) in READERS:
        return cast("Mapping[Any, Any]", read_file(source, split, streaming, what))
    found = saved_data_set(source)
    if found is None:
        found = read_data_set(source, name=config, streaming=streaming)
    return found if isinstance(found, Mapping) else {split: found}


def split_of(splits: Mapping[Any, Any], split: str, source: str) -> Any:
    """The rows of a split. ValueError: no such split; `source` is the name of the data in the message."""
    if split not in splits:
        raise UserValueError(f"{source} has no split '{split}'; it has {', '.join(map(str, splits))}.")
    return splits[split]


def check_data_file(path: str | os.PathLike[str], streaming: bool = False, what: str = "file") -> Path:
    """Check that `datasets` will read a file rightly: it misreads some text silently, or refuses it without its place.
    ValueError, with the line, for damaged text, another encoding or no text; of a stream, in its beginning alone."""
    place = check_is_file(path, what)
    if text_suffix(place) == ".parquet":
        return place
    first = check_plain(place, head=_HEAD if streaming else None)
    if not first:
        raise UserValueError(f"no rows in '{place}'.")
    if READERS.get(text_suffix(place)) == "json" and first.startswith("["):
        read_json(place)  # `datasets` would leave out half of a surrogate pair without a word
    return place


@contextmanager
def reading(name: str, place: Path | None = None) -> Iterator[None]:
    """Turn what `datasets` raises while it reads `name` into FileNotFoundError or ValueError for users, the latter with
    the deepest reason; `place` is the file, if it is one."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserFileNotFoundError(f"no data set '{name}': {_words(error)}") from error
    except Exception as error:  # whatever pyarrow, pandas and the builders of `datasets` raise for a file
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise UserValueError(f"no rows in '{name}'.") from error
        where = "" if place is None else _faulty_line(place)
        raise UserValueError(f"{name} cannot be read: {_words(error)}{where}") from error


def _faulty_line(place: Path) -> str:
    """The words of our own readers, which name the line, for a file that `datasets` refused; "" if they take it."""
    suffix = text_suffix(place)
    kind = READERS[suffix]
    try:
        if kind == "json":
            deque(read_jsonl(place), maxlen=0)
        elif kind == "csv":
            deque(read_csv(place, separator="\t" if suffix == ".tsv" else ","), maxlen=0)
    except UserValueError as error:
        return f" ({error})"
    return ""


def _words(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
