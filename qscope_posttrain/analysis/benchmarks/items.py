"""Read the items of a benchmark as texts: from JSONL, CSV, TSV, or a data set on disk or on the hub."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import regex

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError, did_you_mean
from qscope_posttrain.files import check_is_file, read_csv, read_jsonl, text_suffix
from qscope_posttrain.recipe_file import as_text, read_yaml
from qscope_posttrain.text.inputs import read_splits, split_of

TEXT = "text"  # Placeholder of the item in a prompt template

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_NOT_LETTERS = regex.compile(r"[^\p{L}\p{N}]+")


@dataclass(frozen=True, eq=False)
class BenchmarkItems:
    """The texts of a benchmark as a model reads them, in order."""

    name: str
    texts: tuple[str, ...]
    units: tuple[str, ...]  # Equal for items that are one observation, such as translations; by default the plain text
    source: str = ""
    prompt: str = "{text}"  # Already applied to `texts`

    def plain_texts(self) -> list[str]:
        """See `plain_text`: equal for items that differ in punctuation, spaces and case only."""
        return [plain_text(text) for text in self.texts]


@dataclass(frozen=True)
class ItemSource:
    """Location of a benchmark, and which part of each row is read."""

    name: str
    source: str  # `.jsonl`, `.csv`, `.tsv`, each also with `.gz`; a folder of `datasets`; or a data set of the hub
    field: str | None = None  # A column; in CSV and TSV also its number from 0, for files without a header
    template: str | None = None  # Instead: a text with columns in braces, "{question}\n{choices}"; lists become lines
    unit: str | None = None  # Column that is equal for items that are one observation; `#`: the row number
    unit_prefix: str = ""  # Prefix of the unit, so that row numbers of unrelated benchmarks differ
    split: str | None = None  # Split of a data set with several
    config: str | None = None  # Configuration of a data set of the hub
    first: int = 0  # Number of rows to skip at the start
    limit: int | None = None  # Maximum number of rows

    def __post_init__(self) -> None:
        if (self.field is None) == (self.template is None):
            raise UserValueError(f"benchmark '{self.name}': give either a field or a template.")
        if self.first < 0 or (self.limit is not None and self.limit < 1):
            raise UserValueError(f"benchmark '{self.name}': first must be 0 or more, and limit 1 or more.")

    def limited(self, limit: int) -> ItemSource:
        """The same source with `limit` rows or fewer."""
        return replace(self, limit=limit if self.limit is None else min(limit, self.limit))

    @classmethod
    def parse(cls, word: str) -> ItemSource:
        """Parse `NAME=SOURCE:FIELD`, or the same with a template instead of the field."""
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


def benchmark_sources(words: Sequence[str], limit: int | None = None) -> list[ItemSource]:
    """Read NAME=SOURCE:FIELD words, or a YAML file that maps names to the fields of ItemSource."""
    if len(words) == 1 and Path(words[0]).suffix in (".yaml", ".yml"):
        entries, written = read_yaml(words[0]), read_yaml(words[0], as_written=True)
        sources = [_source(str(name), entry, written.get(str(name)), words[0]) for name, entry in entries.items()]
    else:
        sources = [ItemSource.parse(word) for word in words]
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise UserValueError(f"benchmarks need different names, got {', '.join(names)}.")
    return sources if limit is None else [source.limited(limit) for source in sources]


def read_items(source: ItemSource, prompt: str = "{text}") -> BenchmarkItems:
    """Read a benchmark. A row without text is an error and is not skipped, because the order may matter.

    `prompt` is text around every item, which stands for `{text}`. A common ending ("{text}\\nAnswer:") makes the last
    token the same for all items, so that their last words do not enter the comparison.
    """
    if TEXT not in _columns(prompt):
        raise UserValueError(f"a prompt must contain {{text}}, which is replaced by the item; got {prompt!r}.")
    template = source.template if source.template is not None else f"{{{source.field}}}"
    texts, units = [], []
    stop = None if source.limit is None else source.first + source.limit
    for number, row in islice(enumerate(read_rows(source)), source.first, stop):
        try:
            text = fill(template, row)
        except ValueError as error:
            raise UserValueError(f"benchmark '{source.name}', row {number}: {error}") from error
        if not text.strip():
            raise UserValueError(f"benchmark '{source.name}', row {number}: no text.")
        texts.append(fill(prompt, {TEXT: text}))
        units.append(_unit(source, row, number, text))
    if not texts:
        raise UserValueError(f"benchmark '{source.name}' has no items in '{source.source}'.")
    return BenchmarkItems(source.name, tuple(texts), tuple(units), source.source, prompt)


def read_rows(source: ItemSource) -> Iterator[Mapping[str, Any]]:
    """Read the rows of a source as mappings; a table without a header has the columns "0", "1", ..."""
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
    """Replace `{column}` in a template; `{{` and `}}` are braces. No attribute or index is looked up, so that a recipe
    can name nothing but columns."""
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


def _unit(source: ItemSource, row: Mapping[str, Any], number: int, text: str) -> str:
    if source.unit is None:
        return plain_text(text)
    if source.unit == "#":
        return f"{source.unit_prefix}#{number}"
    if source.unit not in row:
        raise UserValueError(f"benchmark '{source.name}', row {number}: no column '{source.unit}' for the unit.")
    return f"{source.unit_prefix}{row[source.unit]}"


def _columns(template: str) -> list[str]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserValueError(f"template {template!r}: {error}; write a brace of the text itself twice.") from error
    return [name for _, name, _, _ in parsed if name is not None]


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "\n".join(_as_text(entry) for entry in value)
    return "" if value is None else str(value)


def _table(source: ItemSource, separator: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV or TSV file; without a header where all columns are named by number."""
    rows = read_csv(source.source, separator=separator)
    named = [source.field] if source.field is not None else _columns(source.template or "")
    header = None if all(str(name).isdecimal() for name in named) else next(rows, (0, []))[1]
    for number, cells in rows:
        names = header if header is not None else [str(column) for column in range(len(cells))]
        if len(cells) != len(names):
            raise UserValueError(
                f"benchmark '{source.name}', line {number}: {len(cells)} cells for {len(names)} columns."
            )
        yield dict(zip(names, cells, strict=True))


def _data_set(source: ItemSource) -> Iterator[Mapping[str, Any]]:
    splits = read_splits(source.source, source.split or "train", source.config)
    if source.split is None and len(splits) > 1:
        raise UserValueError(f"benchmark '{source.name}': several splits; choose one of {', '.join(map(str, splits))}.")
    yield from split_of(splits, source.split or next(iter(splits)), f"benchmark '{source.name}'")


def _source(name: str, entry: Any, written: Any, path: str) -> ItemSource:
    if not isinstance(entry, dict):
        raise UserValueError(f"{path}: '{name}' must map keys such as source and field to values, got {entry!r}.")
    known = [item.name for item in fields(ItemSource) if item.name != "name"]
    for key in entry:
        if key not in known:
            raise UserValueError(f"{path}: unknown key '{key}' of '{name}'.{did_you_mean(str(key), known)}")
    if "source" not in entry:
        raise UserValueError(f"{path}: '{name}' has no source.")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        whole = key in ("first", "limit")
        if type(value) is not int if whole else not isinstance(value, str | int | float):
            kind = "a whole number" if whole else "text"
            raise UserValueError(f"{path}: {key} of '{name}' must be {kind}, got {value!r}.")
        as_written = written.get(key) if isinstance(written, dict) else None
        values[key] = value if whole else as_text(value) if as_written is None else as_written
    return ItemSource(name=name, **values)
