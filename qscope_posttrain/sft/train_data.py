"""The trainer's training data with the columns that tell the language, and its collator around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import Trainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sft.language_ids import (
    LANGUAGE_NAMES,
    TOKEN_LANGUAGES,
    LanguageCollator,
    LanguageRule,
    SampleLanguage,
)


def language_columns(trainer: Trainer, rule: LanguageRule) -> tuple[str, ...]:
    """The columns of the training data that telling the language needs.

    Raises:
        ValueError: they are not there; the message says how to provide them.
    """
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
    if callable(rule) or rule == "script":
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
    extra = [column for column in columns if column not in signature]
    decode = partial(stock.processing_class.decode, skip_special_tokens=True)
    # What the trainer would have removed must not reach its collator.
    drop = extra if stock.args.remove_unused_columns else []
    stock.data_collator = LanguageCollator(collator, SampleLanguage(rule, languages, ignore, decode), key, drop)
    stock._signature_columns = signature + extra
    try:
        return build()
    finally:
        stock.data_collator, stock._signature_columns = collator, signature
