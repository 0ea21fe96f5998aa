"""The trainer's training data with the columns that tell the language, and its collator around them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from typing import Any

from datasets import ClassLabel, Dataset, Value
from transformers import Trainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import if_many, progress
from qscope_posttrain.sft.language_ids import (
    LANGUAGE_NAMES,
    NO_LANGUAGE,
    SCRIPT,
    TOKEN_LANGUAGES,
    LanguageCollator,
    LanguageRule,
    SampleLanguage,
)
from qscope_posttrain.text.language_labels import class_names, distinct_labels


def language_columns(
    trainer: Trainer, rule: LanguageRule, languages: Sequence[str], ignore: Sequence[str], target: str
) -> tuple[str, ...]:
    """The columns of the training data that decide the language. All rows in memory are looked at.

    Warns where none of them is in a language on which a loss against `target` acts.

    Raises:
        ValueError: they are not there, or a row is in no known language; the message says how to provide them.
    """
    columns = _columns(trainer, rule)
    data: Any = trainer.train_dataset
    if isinstance(data, Dataset):  # a stream is looked at batch by batch, as it comes
        decide = _sample_language(trainer, rule, languages, ignore)
        if rule == SCRIPT and TOKEN_LANGUAGES not in columns and "labels" not in columns:
            # Only the collator knows which tokens carry the loss.
            collator = LanguageCollator(trainer.data_collator, decide, SCRIPT, _dropped(trainer, columns))
            found = _each_row(data, lambda row: int(collator([row])[SCRIPT].amax()))
            counts = Counter(languages[place] if place >= 0 else NO_LANGUAGE for place in found)
        else:
            counts = count_languages(data, decide)
        if nothing := without_effect(counts, target, ignore):
            warnings.warn(nothing, stacklevel=2)
    return columns


def without_effect(counts: Mapping[str, int], target: str, ignore: Collection[str]) -> str:
    """A sentence if no row is in a language on which a loss against `target` acts, or nothing."""
    if set(counts) - {target, *ignore, NO_LANGUAGE}:
        return ""
    return (
        f"All {sum(counts.values())} rows are in {', '.join(sorted(counts))}; the loss acts on rows in languages other "
        f"than the target {target!r} and those that are ignored, so it would do nothing."
    )


def count_languages(rows: Dataset | Iterable[Any], decide: SampleLanguage) -> Counter[str]:
    """Rows per language, of all rows.

    Args:
        rows: a data set in memory, of which a column is read as a whole, or any samples.

    Raises:
        ValueError: a row in no known language, with its number.
    """
    columns = rows.column_names if isinstance(rows, Dataset) and rows.format["type"] != "custom" else ()
    column = LANGUAGE_NAMES if TOKEN_LANGUAGES in columns else decide.rule
    if column not in columns or column == SCRIPT or not _holds_names(rows, column):
        return Counter(languages_of(rows, decide))
    counts: Counter[str] = Counter()
    for label in distinct_labels(rows, str(column)):
        counts[_at(label.row, lambda value: _known(decide, decide.name(value)), label.value)] += label.times
    return counts


def _holds_names(rows: Any, column: Any) -> bool:
    """Whether a column has single values, or the lists that packing makes; anything else fails row by row."""
    return column == LANGUAGE_NAMES or isinstance(rows.features[column], Value | ClassLabel)


def languages_of(rows: Iterable[Any], decide: SampleLanguage, total: int | None = None) -> list[str]:
    """The language of every row, by name; any name where `decide` knows no languages.

    Args:
        total: number of rows, where they have no length.

    Raises:
        ValueError: a row in no known language, with its number.
    """
    return _each_row(rows, lambda row: _known(decide, decide(row)), total)


def _known(decide: SampleLanguage, language: str) -> str:
    if decide.languages:
        decide.id(language)
    return language


def _each_row(rows: Iterable[Any], look: Callable[[Any], Any], total: int | None = None) -> list[Any]:
    total = len(rows) if isinstance(rows, Sized) else total
    shown = progress(rows, total, "looking at languages", if_many(total))
    return [_at(number, look, row) for number, row in enumerate(shown)]


def _at(number: int, look: Callable[[Any], Any], value: Any) -> Any:
    try:
        return look(value)
    except UserValueError as error:
        raise UserValueError(f"Row {number} of the training data: {error}") from error


def _columns(trainer: Trainer, rule: LanguageRule) -> tuple[str, ...]:
    args: Any = trainer.args
    dataset: Any = trainer.train_dataset
    columns = getattr(dataset, "column_names", None)  # None: an iterable data set that does not know them
    if columns is not None and TOKEN_LANGUAGES in columns:
        return TOKEN_LANGUAGES, LANGUAGE_NAMES
    if args.packing:
        raise UserValueError(
            "SFTTrainer(packing=True) keeps only token ids and labels, so a packed row no longer tells the language of "
            "its documents. Pack with qscope_posttrain.pack_with_languages(dataset, tokenizer, max_length=...) and "
            "train with packing=False, padding_free=True, max_length=None, "
            'dataset_kwargs={"skip_prepare_dataset": True}.'
        )
    if callable(rule) and columns is None and args.remove_unused_columns:
        raise UserValueError(
            "The training data does not say which columns it has, so the trainer would remove all that a function of "
            "the example may read. Set remove_unused_columns=False, or name a column."
        )
    if callable(rule) or rule == SCRIPT:
        # Which columns a function reads is unknown: it gets them all.
        return tuple(columns or ())
    if columns is not None and rule not in columns:
        raise UserValueError(
            f"The training data has no column {rule!r} to tell a sample's language by; it has {', '.join(columns)}. "
            'Name another column, or pass language="script" or a function of the example.'
        )
    return (rule,)


def with_languages(
    build: Callable[[], Any],
    trainer: Trainer,
    columns: Sequence[str],
    rule: LanguageRule,
    languages: Sequence[str],
    ignore: Sequence[str],
    key: str,
) -> Any:
    """Call `build()`, the trainer's `get_train_dataloader`, while its collator adds `batch[key]`.

    The collator is wrapped and the columns are kept for this one dataloader; evaluation never sees either.
    """
    stock: Any = trainer
    stock._set_signature_columns_if_needed()
    collator, signature = stock.data_collator, list(stock._signature_columns)
    drop = _dropped(trainer, columns)
    decide = _sample_language(trainer, rule, languages, ignore)
    stock.data_collator = LanguageCollator(collator, decide, key, drop)
    stock._signature_columns = signature + [column for column in columns if column not in signature]
    try:
        return build()
    finally:
        stock.data_collator, stock._signature_columns = collator, signature


def _sample_language(
    trainer: Trainer, rule: LanguageRule, languages: Sequence[str], ignore: Sequence[str]
) -> SampleLanguage:
    tools: Any = trainer.processing_class
    return SampleLanguage(rule, languages, ignore, tools.decode, class_names(trainer.train_dataset, rule))


def _dropped(trainer: Any, columns: Sequence[str]) -> list[str]:
    """Columns that the trainer would have removed, and that must not reach its collator."""
    trainer._set_signature_columns_if_needed()
    extra = [column for column in columns if column not in trainer._signature_columns]
    return extra if trainer.args.remove_unused_columns else []
