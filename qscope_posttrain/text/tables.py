"""Read and write tables of texts and labels, in the formats of `datasets`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserValueError, did_you_mean, library_refusals
from qscope_posttrain.text.data_sets import read_splits, split_of

if TYPE_CHECKING:
    from datasets import Dataset

WRITERS = (".jsonl", ".csv", ".parquet")
_TRUTHS = {"1": True, "true": True, "0": False, "false": False}


def read_table(source: str, split: str = "train", limit: int | None = None) -> Dataset:
    """Read one split of a file, of a folder written by `save_to_disk`, or of a data set of the hub.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: no such split, or no rows.
    """
    found = split_of(read_splits(source, split), split, f"'{source}'")
    if not len(found):
        raise UserValueError(f"'{source}' has no rows.")
    return found if limit is None else found.select(range(min(limit, len(found))))


def column(table: Dataset, name: str, source: str) -> list[Any]:
    """All values of a column. ValueError: no such column."""
    if name not in table.column_names:
        known = ", ".join(table.column_names)
        raise UserValueError(
            f"'{source}' has no column '{name}'; it has {known}.{did_you_mean(name, table.column_names)}"
        )
    return list(table[name])


def texts_of(table: Dataset, name: str, source: str) -> list[str]:
    """A column of texts. ValueError: no such column, or a row without text, by its number from 0."""
    values = column(table, name, source)
    wrong = [row for row, value in enumerate(values) if not isinstance(value, str) or not value.strip()]
    if wrong:
        raise UserValueError(
            f"'{source}': column '{name}' has no text in {len(wrong)} rows, for example row {wrong[0]}."
        )
    return values


def labels_of(table: Dataset, name: str, positive: str | None, source: str) -> list[bool]:
    """A column of labels as booleans: whether each is the positive one.

    Raises:
        ValueError: no such column, no such label, or labels that need `positive` to be understood.
    """
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
            raise UserValueError(
                f"'{source}': no label in '{name}' is '{positive}'; there are {', '.join(kinds[:10])}."
            )
        flags = [word == positive for word in chosen]
    elif names is None and all(word.lower() in _TRUTHS for word in kinds):
        flags = [_TRUTHS[word.lower()] for word in words]
    else:
        raise UserValueError(
            f"'{source}': name the positive label with --positive; '{name}' has {', '.join(kinds[:10])}."
        )
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
    """Write a table as .jsonl, .csv or .parquet by the name, or else as a folder for `load_from_disk`.

    Raises:
        OSError: the place cannot be written.
    """
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
