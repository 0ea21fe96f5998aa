"""The trainer's training data with the columns that tell the language, and its collator around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

from datasets import Dataset
from transformers import Trainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sft.language_ids import (
    LANGUAGE_NAMES,
    SCRIPT,
    TOKEN_LANGUAGES,
    LanguageCollator,
    LanguageRule,
    SampleLanguage,
)
from qscope_posttrain.text.language_labels import class_names, distinct_labels

PROGRESS_FROM = 100_000
"""Rows from which on looking at them shows how far it is"""


def language_columns(
    trainer: Trainer, rule: LanguageRule, languages: Sequence[str] = (), ignore: Sequence[str] = ()
) -> tuple[str, ...]:
    """The columns of the training data that telling the language needs; with `languages`, all rows are looked at.

    Raises:
        ValueError: they are not there, or a row is in no known language; the message says how to provide them.
    """
    columns = _columns(trainer, rule)
    data: Any = trainer.train_dataset
    if languages and isinstance(data, Dataset):  # a stream is looked at batch by batch, as it comes
        decide = _sample_language(trainer, rule, languages, ignore)
        if rule == SCRIPT and TOKEN_LANGUAGES not in columns and "labels" not in columns:
            # Only the collator knows which tokens carry the loss.
            collator = LanguageCollator(trainer.data_collator, decide, SCRIPT, _dropped(trainer, columns))
            _each_row(data, lambda row: collator([row]))
        else:
            count_languages(data, decide)
    return columns


def count_languages(rows: Dataset | Iterable[Any], decide: SampleLanguage) -> Counter[str]:
    """Rows per language, of all rows.

    Args:
        rows: a data set in memory, of which a column is read as a whole, or any samples.

    Raises:
        ValueError: a row in no known language, with its number.
    """
    columns = rows.column_names if isinstance(rows, Dataset) and rows.format["type"] != "custom" else ()
    column = LANGUAGE_NAMES if TOKEN_LANGUAGES in columns else decide.rule
    if column not in columns or column == SCRIPT:
        return Counter(languages_of(rows, decide))
    counts: Counter[str] = Counter()
    for label in distinct_labels(rows, str(column)):
        counts[_at(label.row, lambda value: _known(decide, decide.name(value)), label.value)] += label.times
    return counts


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
    many = total is not None and total >= PROGRESS_FROM
    shown = progress(rows, total, description="telling the languages of the rows", enabled=None if many else False)
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
    """What the trainer would have removed must not reach its collator."""
    trainer._set_signature_columns_if_needed()
    extra = [column for column in columns if column not in trainer._signature_columns]
    return extra if trainer.args.remove_unused_columns else []
