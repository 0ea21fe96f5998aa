"""Items of a benchmark as texts: from JSONL, CSV, TSV, or a data set on disk or on the hub."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import regex

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.files import check_is_file, read_csv, text_suffix
from qscope_posttrain.text.data_sets import read_data_set, saved_data_set
from qscope_posttrain.text.jsonl import read_jsonl

TEXT = "text"
"""The place of an item in a prompt template."""

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_NOT_LETTERS = regex.compile(r"[^\p{L}\p{N}]+")


@dataclass(frozen=True, eq=False)
class BenchmarkItems:
    """What a model reads of each item, in order."""

    name: str
    texts: tuple[str, ...]
    units: tuple[str, ...]
    """Equal where items are one observation, for example translations of one question; by default the plain text"""
    source: str = ""
    prompt: str = "{text}"
    """Already applied to `texts`"""

    def plain_texts(self) -> list[str]:
        """Letters and digits alone, in lower case: equal where two items say the same, quotes and spaces apart."""
        return [plain_text(text) for text in self.texts]


@dataclass(frozen=True)
class ItemSource:
    """Where the items of one benchmark are, and what of a row is read."""

    name: str
    source: str
    """`.jsonl`, `.csv` or `.tsv`, each also with `.gz`; a folder written by `datasets`; or a data set of the hub"""
    field: str | None = None
    """A column; in CSV and TSV also its number from 0, for files without a header"""
    template: str | None = None
    """Instead of a column, a text with columns in braces, such as "{question}\\n{choices}"; lists become lines"""
    unit: str | None = None
    """A column whose value is the same where items of several benchmarks are one observation; `#` is the row number"""
    unit_prefix: str = ""
    """Put before the unit, so that row numbers of unrelated benchmarks differ"""
    split: str | None = None
    """Of a data set with several"""
    config: str | None = None
    """Of a data set of the hub"""
    first: int = 0
    """Rows left out at the start"""
    limit: int | None = None
    """Rows read at most"""

    def __post_init__(self) -> None:
        if (self.field is None) == (self.template is None):
            raise UserValueError(f"benchmark '{self.name}': give either a field or a template.")
        if self.first < 0 or (self.limit is not None and self.limit < 1):
            raise UserValueError(f"benchmark '{self.name}': first must be 0 or more, and limit 1 or more.")

    def limited(self, limit: int) -> ItemSource:
        """The same with at most so many rows."""
        return replace(self, limit=limit if self.limit is None else min(limit, self.limit))

    @classmethod
    def parse(cls, word: str) -> ItemSource:
        """From `NAME=SOURCE:FIELD`, or with a template for the field.

        Raises:
            ValueError: a word of another form.
        """
        name, _, rest = word.partition("=")
        brace = rest.find("{")
        colon = rest.rfind(":", 0, brace if brace >= 0 else len(rest))
        source, what = rest[:colon], rest[colon + 1 :]
        if not name or colon < 1 or not what:
            raise UserValueError(
                f"expected NAME=SOURCE:FIELD, for example gsm8k=gsm8k_test.jsonl:question; got '{word}'."
            )
        if brace >= 0:
            return cls(name, source, template=what.replace("\\n", "\n"))
        return cls(name, source, field=what)


def read_items(source: ItemSource, prompt: str = "{text}") -> BenchmarkItems:
    """Read a benchmark; rows without text are an error, not left out, because their order may matter.

    Args:
        prompt: around every item, `{text}` in its place; the last token is read after it, so that a common ending
            ("{text}\\nAnswer:") takes the last words of the items out of the comparison.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column that is not there, an item without text, a prompt without `{text}`.
    """
    if TEXT not in _fields(prompt):
        raise UserValueError(f"a prompt holds {{text}}, where the item goes; got {prompt!r}.")
    texts, units = [], []
    rows = enumerate(read_rows(source))
    stop = None if source.limit is None else source.first + source.limit
    for number, row in islice(rows, source.first, stop):
        text = _text(source, row, number)
        if not text.strip():
            raise UserValueError(f"benchmark '{source.name}', row {number}: no text.")
        texts.append(fill(prompt, {TEXT: text}))
        units.append(_unit(source, row, number, text))
    if not texts:
        raise UserValueError(f"benchmark '{source.name}' has no items in '{source.source}'.")
    return BenchmarkItems(source.name, tuple(texts), tuple(units), source.source, prompt)


def read_rows(source: ItemSource) -> Iterator[Mapping[str, Any]]:
    """The rows of a source as mappings; a table without a header has columns "0", "1", ..."""
    suffix = text_suffix(source.source)
    if suffix == ".jsonl" or suffix in _SEPARATORS:
        try:
            check_is_file(source.source)
        except UserFileNotFoundError as error:
            raise UserFileNotFoundError(f"benchmark '{source.name}': {error}") from error
    if suffix == ".jsonl":
        yield from (row for _, row in read_jsonl(source.source))
    elif suffix in _SEPARATORS:
        yield from _table(source, _SEPARATORS[suffix])
    else:
        yield from _data_set(source)


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template with `{column}` replaced; `{{` and `}}` are braces. No attribute or index is looked up, so that a
    recipe can name nothing but columns.

    Raises:
        ValueError: a column that is not there, or anything else in braces.
    """
    parts = []
    for literal, name, form, conversion in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            if form or conversion:
                raise UserValueError(f"{{{name}}} takes no format; write the column alone in braces.")
            if name not in values:
                raise UserValueError(f"no column '{name}'; there are {', '.join(map(str, values))}.")
            parts.append(_as_text(values[name]))
    return "".join(parts)


def plain_text(text: str) -> str:
    """Letters and digits in lower case, everything else as single spaces."""
    return _NOT_LETTERS.sub(" ", text.casefold()).strip() or text


def _text(source: ItemSource, row: Mapping[str, Any], number: int) -> str:
    try:
        return fill(source.template if source.template is not None else f"{{{source.field}}}", row)
    except ValueError as error:
        raise UserValueError(f"benchmark '{source.name}', row {number}: {error}") from error


def _unit(source: ItemSource, row: Mapping[str, Any], number: int, text: str) -> str:
    if source.unit is None:
        return plain_text(text)
    if source.unit == "#":
        return f"{source.unit_prefix}#{number}"
    if source.unit not in row:
        raise UserValueError(f"benchmark '{source.name}', row {number}: no column '{source.unit}' for the unit.")
    return f"{source.unit_prefix}{row[source.unit]}"


def _fields(template: str) -> list[str]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserValueError(f"template {template!r}: {error}; a brace of the text itself is written twice.") from error
    return [name for _, name, _, _ in parsed if name is not None]


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "\n".join(_as_text(entry) for entry in value)
    return str(value)


def _table(source: ItemSource, separator: str) -> Iterator[dict[str, str]]:
    """With numbers for columns there is no header."""
    rows = read_csv(source.source, separator=separator)
    named = [source.field] if source.field is not None else _fields(source.template or "")
    header = None if all(str(name).isdecimal() for name in named) else next(rows, (0, []))[1]
    for number, cells in rows:
        names = header if header is not None else [str(column) for column in range(len(cells))]
        if len(cells) != len(names):
            raise UserValueError(
                f"benchmark '{source.name}', line {number}: {len(cells)} cells for {len(names)} columns."
            )
        yield dict(zip(names, cells, strict=True))


def _data_set(source: ItemSource) -> Iterator[Mapping[str, Any]]:
    from datasets import DatasetDict, IterableDatasetDict

    found = saved_data_set(source.source)
    if found is None:
        found = read_data_set(source.source, name=source.config)
    if isinstance(found, DatasetDict | IterableDatasetDict):
        if source.split not in found:
            wanted = f"no split '{source.split}'" if source.split else "several splits"
            raise UserValueError(f"benchmark '{source.name}': {wanted}; choose one of {', '.join(map(str, found))}.")
        found = found[source.split]
    yield from found
