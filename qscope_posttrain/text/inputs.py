"""Read what commands are given: texts by language, lists of texts, prompts, tables and data sets; and write tables.

Data sets and tables are read with `datasets`, whose errors are turned into words that a user can act on.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qscope_posttrain.errors import UserError, UserFileNotFoundError, UserValueError, did_you_mean, library_refusals
from qscope_posttrain.files import check_is_file, check_plain, read_csv, read_json, read_jsonl, read_lines, text_suffix

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Suffix of a local file (see `files.text_suffix`) -> the reader of `datasets`."""
WRITERS = (".jsonl", ".csv", ".parquet")
_TRUTHS = {"1": True, "true": True, "0": False, "false": False}
_HEAD = 1000  # Lines of a stream that are checked beforehand


def read_texts(path: str | Path, limit: int | None = None) -> dict[str, list[str]]:
    """Texts by language, the first `limit` of each, from a folder of `<language>.txt` (one text per line) or a JSONL
    file of text and language. ValueError for a file or a line of another form, or a language without text."""
    location = Path(path)
    if location.is_dir():
        files = sorted(file for file in location.iterdir() if text_suffix(file) == ".txt" and file.name[0] != ".")
        if not files:
            raise UserFileNotFoundError(f"no <language>.txt in '{location}', for example en.txt, with one text a line.")
        texts = {file.name[: file.name.rindex(".txt")]: _lines(file, limit) for file in files}
        if len(texts) < len(files):
            raise UserValueError(f"'{location}' has a language twice: {', '.join(file.name for file in files)}.")
    elif not location.exists() and not location.is_symlink():
        raise UserFileNotFoundError(f"no texts at '{location}': expected a folder of <language>.txt, or a JSONL file.")
    else:
        texts = {}
        for number, row in read_jsonl(location):
            text, language = row.get("text"), row.get("language")
            if not isinstance(text, str) or not _is_name(language):
                raise UserValueError(
                    f"{location}, line {number}: expected strings 'text' and 'language', "
                    f"{_got(row, 'text', 'language')}."
                )
            kept = texts.setdefault(str(language), [])
            if text.strip() and (limit is None or len(kept) < limit):
                kept.append(text)
    empty = sorted(language for language, entries in texts.items() if not entries)
    if empty or not texts:
        raise UserValueError(f"'{location}' has no text in {', '.join(empty) or 'any language'}.")
    return texts


def read_text_list(path: str | Path, limit: int | None = None, jsonl: bool = False) -> list[str]:
    """Texts of one set: a text file with one per line, or JSONL with `text`, as which any file is read with `jsonl`.
    ValueError for a line of another form, or no text at all."""
    location = check_is_file(path)
    if text_suffix(location) != ".jsonl" and not jsonl:
        texts = _lines(location, limit)
    else:
        texts = []
        for number, row in read_jsonl(location):
            if not isinstance(row.get("text"), str):
                raise UserValueError(f"{location}, line {number}: expected a string 'text', {_got(row, 'text')}.")
            if row["text"].strip() and (limit is None or len(texts) < limit):
                texts.append(row["text"])
    if not texts:
        raise UserValueError(f"'{location}' has no texts.")
    return texts


def read_prompts(path: str | Path, limit: int | None = None, language: str | None = None) -> dict[str, list[Any]]:
    """Prompts by source language, the first `limit` of each, from JSONL with `prompt` (text or chat messages) and
    `language`, or as `read_texts`. `tools` and `chat_template_kwargs` beside a prompt stay with it, for the chat
    template. A row without a language is in `language`, and without that a ValueError, as a line of another form is."""
    location = Path(path)
    if location.is_dir():
        return {language: list(lines) for language, lines in read_texts(location, limit).items()}
    prompts: dict[str, list[Any]] = {}
    for number, row in read_jsonl(location, packed=False):
        prompt, own = row.get("prompt"), row.get("language", language)
        if not isinstance(prompt, str | list) or not _is_name(own):
            raise UserValueError(
                f"{location}, line {number}: expected 'prompt' (text or a list of messages) and 'language', "
                f"{_got(row, 'prompt', 'language')}."
            )
        kept = prompts.setdefault(str(own), [])
        if limit is None or len(kept) < limit:
            columns = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
            kept.append({"prompt": prompt, **columns} if columns else prompt)
    if not prompts:
        raise UserValueError(f"'{location}' has no prompts.")
    return prompts


def _lines(file: Path, limit: int | None) -> list[str]:
    return list(islice((line.strip() for line in read_lines(file) if line.strip()), limit))


def _is_name(language: Any) -> bool:
    return isinstance(language, str) and bool(language.strip())


def _got(row: dict[str, Any], *wanted: str) -> str:
    """The values of the wanted keys, or the keys that are there."""
    if all(key in row for key in wanted):
        return "got " + " and ".join(f"{key!r}: {row[key]!r:.60}" for key in wanted)
    return f"got the keys {sorted(row)}"


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
    """{split: rows} of a file, of a folder written by `save_to_disk`, or of a data set of the hub, there with this
    configuration. `split` is the name of rows that come without one."""
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


def read_table(source: str, split: str = "train", limit: int | None = None) -> Dataset:
    """Read one split of a file, of a folder written by `save_to_disk`, or of a data set of the hub. ValueError for no
    such split, or no rows."""
    found = split_of(read_splits(source, split), split, f"'{source}'")
    if not len(found):
        raise UserValueError(f"'{source}' has no rows.")
    return found if limit is None else found.select(range(min(limit, len(found))))


def column(table: Dataset, name: str, source: str) -> list[Any]:
    """All values of a column. ValueError: no such column."""
    if name not in table.column_names:
        known = ", ".join(table.column_names)
        hint = did_you_mean(name, table.column_names)
        raise UserValueError(f"'{source}' has no column '{name}'; it has {known}.{hint}")
    return list(table[name])


def texts_of(table: Dataset, name: str, source: str) -> list[str]:
    """A column of texts. ValueError: no such column, or a row without text, by its number from 0."""
    values = column(table, name, source)
    wrong = [row for row, value in enumerate(values) if not isinstance(value, str) or not value.strip()]
    if wrong:
        raise UserValueError(f"'{source}': column '{name}' has no text in {len(wrong)} rows, as in row {wrong[0]}.")
    return values


def labels_of(table: Dataset, name: str, positive: str | None, source: str) -> list[bool]:
    """A column of labels as booleans: whether each is the positive one. ValueError for no such column, no such label,
    or labels that need `positive` to be understood."""
    values = column(table, name, source)
    feature = table.features.get(name)
    names = getattr(feature, "names", None)  # a ClassLabel holds numbers that stand for names
    missing = [row for row, value in enumerate(values) if _is_missing(value, names is not None)]
    if missing:
        raise UserValueError(
            f"'{source}': column '{name}' has no label in {len(missing)} rows, for example row {missing[0]} "
            f"({values[missing[0]]!r}). Take these rows out: they belong to neither class."
        )
    words = [names[value] if names is not None and isinstance(value, int) else str(value) for value in values]
    kinds = sorted(set(words))
    if positive is not None:
        numbers = [str(value) for value in values]
        chosen = words if positive in kinds else numbers
        if positive not in chosen:
            raise UserValueError(f"'{source}': no label in '{name}' is '{positive}'; it has {', '.join(kinds[:10])}.")
        flags = [word == positive for word in chosen]
    elif names is None and all(word.lower() in _TRUTHS for word in kinds):
        flags = [_TRUTHS[word.lower()] for word in words]
    else:
        listed = ", ".join(kinds[:10])
        raise UserValueError(f"'{source}': name the positive label with --positive; '{name}' has {listed}.")
    if all(flags) or not any(flags):
        raise UserValueError(f"'{source}': {sum(flags)} of {len(flags)} rows are positive; both classes are needed.")
    return flags


def _is_missing(value: Any, class_number: bool) -> bool:
    """None, NaN, and for class numbers -1, which stands for 'no label' on the hub."""
    if class_number and isinstance(value, int):
        return value < 0
    return value is None or value != value


def split_rows(groups: Sequence[str], labels: Sequence[bool], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(discovery rows, test rows), ascending: `share` of the rows of each group and class are test rows."""
    if not 0 < share < 1:
        raise UserValueError(f"--test-share must lie between 0 and 1, got {share}.")
    cells: dict[tuple[str, bool], list[int]] = {}
    for row, cell in enumerate(zip(groups, labels, strict=True)):
        cells.setdefault(cell, []).append(row)
    generator = random.Random(seed)
    test: list[int] = []
    for rows in cells.values():
        test += generator.sample(rows, round(share * len(rows)))
    chosen = set(test)
    return [row for row in range(len(labels)) if row not in chosen], sorted(test)


def write_table(table: Dataset, path: Path) -> None:
    """Write a table as .jsonl, .csv or .parquet by the name, or else as a folder for `load_from_disk`."""
    with library_refusals(f"cannot write '{path}'", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            table.to_json(path, force_ascii=False)
        elif path.suffix == ".csv":
            table.to_csv(path)
        elif path.suffix == ".parquet":
            table.to_parquet(path)
        else:
            table.save_to_disk(path)
