"""Labels of languages in data: find the known language that a label means, and the distinct labels of a column."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

import langcodes

_ROWS_AT_A_TIME = 10_000


class Label(NamedTuple):
    """A distinct value of a column."""

    value: Any
    row: int  # The first row that holds it
    times: int


def same_language(label: Any, known: Collection[str]) -> str | None:
    """Find the one of `known` that names the language of `label`; of several, one of the same script goes first. Labels
    are BCP 47 tags ("zh-CN", "zh_Hans"), ISO 639 codes ("zho", "iw"), and English names ("Chinese")."""
    if not isinstance(label, str):
        return None
    wanted = _tag(label)
    if wanted is None:
        return None
    same = [(name, tag) for name in known if (tag := _tag(name)) is not None and tag.language == wanted.language]
    script = wanted.maximize().script
    return next((name for name, tag in same if tag.maximize().script == script), same[0][0] if same else None)


def language_hint(label: Any, known: Collection[str]) -> str:
    """Suggest a known label (" Did you mean 'zh'?"), or nothing, after the given label in a message."""
    meant = same_language(label, known)
    if meant is None and isinstance(label, str) and len(label) == 2 and label.isalpha() and label.isascii():
        spoken = langcodes.Language.get(f"und-{label}").maximize().language  # a country, cn or jp; en if it is none
        meant = None if spoken == "en" else same_language(spoken, known)
    if meant is None and isinstance(label, str):
        bare = {name.casefold(): name for name in known}
        close = difflib.get_close_matches(label.strip().casefold(), bare, n=1, cutoff=0.8)
        meant = bare[close[0]] if close else None
    return "" if meant is None or meant == label else f" Did you mean {meant!r}?"


def listed(names: Collection[str], most: int = 12) -> str:
    """The names with commas, the first `most` of them."""
    first = ", ".join(list(names)[:most])
    return f"{first} and {len(names) - most} more" if len(names) > most else first


def class_names(dataset: Any, column: Any) -> tuple[str, ...]:
    """The names behind the numbers of a ClassLabel column of `datasets`; none for any other column or rule."""
    features = getattr(dataset, "features", None)
    feature = features.get(column) if features and isinstance(column, str) else None
    return tuple(getattr(feature, "names", None) or ())


def distinct_labels(dataset: Any, column: str) -> list[Label]:
    """Find the distinct values of a column of a `datasets.Dataset`, in the order of their first rows. Entries of lists
    count one by one."""
    first: dict[str, tuple[Any, int]] = {}  # by its text: NaN differs from itself
    times: Counter[str] = Counter()
    rows = dataset.select_columns(column).with_format(None)
    values = (value for batch in rows.iter(batch_size=_ROWS_AT_A_TIME) for value in batch[column])
    for row, value in enumerate(values):
        for entry in value if isinstance(value, list) else [value]:
            first.setdefault(repr(entry), (entry, row))
            times[repr(entry)] += 1
    return [Label(*found, times[text]) for text, found in first.items()]


def _tag(label: str) -> langcodes.Language | None:
    """The label as a tag of a registered language, its macrolanguage for languages that have one; else None."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE  # English names -> codes

    text = label.strip().partition(".")[0]  # en_US.UTF-8
    text = TO_LANGUAGE_CODE.get(text.casefold(), text)
    try:
        tag = langcodes.Language.get(langcodes.standardize_tag(text, macro=True)) if text else None
    except langcodes.LanguageTagError:
        return None
    if tag is None or tag.language is None or not tag.is_valid():
        return None
    # The two written standards of Norwegian are mostly labeled as one.
    return tag.update_dict({"language": "no"}) if tag.language in ("nb", "nn") else tag
