"""Languages of the trainer's training data: checked at attach, and carried by its collator to every token."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Value
from torch import Tensor
from transformers import Trainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import if_many, progress
from qscope_posttrain.sft.config import LossConfig
from qscope_posttrain.sft.language_ids import NO_LANGUAGE, SCRIPT, SampleLanguage
from qscope_posttrain.sft.masks import PADDING_ID
from qscope_posttrain.text.language_labels import class_names, distinct_labels

TOKEN_LANGUAGES = "language_ids"
"""Column of packed data sets: index of each token's language in the row's `LANGUAGE_NAMES`"""
LANGUAGE_NAMES = "language_names"  # Column of packed data sets: the names behind `TOKEN_LANGUAGES`


def language_columns(trainer: Trainer, config: LossConfig, languages: Sequence[str]) -> tuple[str, ...]:
    """The columns of the training data that decide the language. All rows in memory are read.

    Warns where none of them is in a language on which a loss against the target acts.

    Raises:
        ValueError: they are not there, or a row is in no known language; the message says how to provide them.
    """
    columns = _columns(trainer, config)
    data: Any = trainer.train_dataset
    if isinstance(data, Dataset):  # a stream is read batch by batch, as it comes
        decide = _sample_language(trainer, config, languages)
        if config.language == SCRIPT and TOKEN_LANGUAGES not in columns and "labels" not in columns:
            # Only the collator knows which tokens carry the loss.
            collator = LanguageCollator(trainer.data_collator, decide, SCRIPT, _dropped(trainer, columns))
            found = _each_row(data, lambda row: int(collator([row])[SCRIPT].amax()))
            counts = Counter(languages[place] if place >= 0 else NO_LANGUAGE for place in found)
        else:
            counts = count_languages(data, decide)
        if nothing := without_effect(counts, str(config.target), config.ignore_languages):
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
    """Rows per language, of a data set in memory or any samples; ValueError for a row in no known language."""
    columns = rows.column_names if isinstance(rows, Dataset) and rows.format["type"] != "custom" else ()
    column: Any = LANGUAGE_NAMES if TOKEN_LANGUAGES in columns else decide.rule
    in_column = column in columns and column != SCRIPT
    # Single values, or the lists that packing makes; anything else fails row by row.
    if not in_column or not (column == LANGUAGE_NAMES or isinstance(rows.features[column], Value | ClassLabel)):  # type: ignore[union-attr]
        return Counter(languages_of(rows, decide))
    counts: Counter[str] = Counter()
    for label in distinct_labels(rows, column):
        counts[_at(label.row, lambda value: _known(decide, decide.name(value)), label.value)] += label.times
    return counts


def languages_of(rows: Iterable[Any], decide: SampleLanguage, total: int | None = None) -> list[str]:
    """The language of every row, by name; ValueError for one that `decide` does not know, if it knows any.

    `total` is the number of rows, where they have no length.
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


def _columns(trainer: Trainer, config: LossConfig) -> tuple[str, ...]:
    args: Any = trainer.args
    rule, columns = config.language, getattr(trainer.train_dataset, "column_names", None)  # None: a stream may not know
    if columns is not None and TOKEN_LANGUAGES in columns:
        return TOKEN_LANGUAGES, LANGUAGE_NAMES
    if args.packing:
        raise UserValueError(
            "SFTTrainer(packing=True) keeps only token ids and labels, so a packed row no longer holds the language of "
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
            f"The training data has no column {rule!r} with a sample's language; it has {', '.join(columns)}. "
            'Name another column, or pass language="script" or a function of the example.'
        )
    return (rule,)


def with_languages(
    build: Callable[[], Any],
    trainer: Trainer,
    columns: Sequence[str],
    config: LossConfig,
    languages: Sequence[str],
    key: str,
) -> Any:
    """Call `build()`, the trainer's `get_train_dataloader`, while its collator adds `batch[key]`.

    The collator is wrapped and the columns are kept for this one dataloader; evaluation never sees either.
    """
    stock: Any = trainer
    drop = _dropped(trainer, columns)
    collator, signature = stock.data_collator, list(stock._signature_columns)
    stock.data_collator = LanguageCollator(collator, _sample_language(trainer, config, languages), key, drop)
    stock._signature_columns = signature + [column for column in columns if column not in signature]
    try:
        return build()
    finally:
        stock.data_collator, stock._signature_columns = collator, signature


def _sample_language(trainer: Trainer, config: LossConfig, languages: Sequence[str]) -> SampleLanguage:
    tools: Any = trainer.processing_class
    classes = class_names(trainer.train_dataset, config.language)
    return SampleLanguage(config.language, languages, config.ignore_languages, tools.decode, classes)


def _dropped(trainer: Any, columns: Sequence[str]) -> list[str]:
    """Columns that the trainer would have removed, and that must not reach its collator."""
    trainer._set_signature_columns_if_needed()
    extra = [column for column in columns if column not in trainer._signature_columns]
    return extra if trainer.args.remove_unused_columns else []


class LanguageCollator:
    """Wraps a collator of `SFTTrainer` and adds the language of every token to its batches.

    Adds `batch[key]`, int64, of the shape of `input_ids`: an index into `SampleLanguage.languages`, or -1 for padding
    and ignored languages. A sample's language holds for all its tokens; rows of `pack_with_languages` bring one per
    token. The rule "script" goes by the labels that `inner` has made.

    Args:
        inner: the trainer's own collator, padded or padding-free.
        language: decides the language of a sample.
        key: name of the entry in the batch.
        drop: columns that were kept in the data set for the language only, and that `inner` must not see.
    """

    def __init__(
        self,
        inner: Callable[[list[dict[str, Any]]], Any],
        language: SampleLanguage,
        key: str,
        drop: Iterable[str] = (),
    ) -> None:
        self.inner = inner
        self.language = language
        self.key = key
        self.drop = frozenset(drop)
        self._read = 0

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        for example in examples:
            if "input_ids" not in example:
                raise UserValueError(
                    f"Expected tokenized samples with 'input_ids', got the columns {', '.join(example)}. "
                    "Vision data sets, which TRL tokenizes in the collator, are not supported."
                )
        lengths = [len(example["input_ids"]) for example in examples]
        batch = self.inner([{k: v for k, v in example.items() if k not in self.drop} for example in examples])
        real = _real_tokens(lengths, batch)
        labels: Any = [None] * len(examples)
        if self.language.rule == SCRIPT and "labels" in batch:
            labels = batch["labels"][real].split(lengths)
        rows = []
        for place, (example, own) in enumerate(zip(examples, labels, strict=True)):
            try:
                rows.append(self._token_ids(example if own is None else {**example, "labels": own.tolist()}))
            except UserValueError as error:
                where = f"sample {place} of the batch, number {self._read + place} that this process has read"
                raise UserValueError(f"{error} (In {where}.)") from error
        self._read += len(examples)
        ids = torch.full_like(batch["input_ids"], PADDING_ID)
        ids[real] = torch.cat(rows)
        batch[self.key] = ids
        return batch

    def _token_ids(self, example: Mapping[str, Any]) -> Tensor:
        """[tokens] language ids of one row of the data set."""
        length = len(example["input_ids"])
        if TOKEN_LANGUAGES not in example:
            return torch.full((length,), self.language.id(self.language(example)))
        local = torch.as_tensor(example[TOKEN_LANGUAGES], dtype=torch.long)
        if len(local) != length:
            raise UserValueError(
                f"A row has {length} tokens but {len(local)} language ids. Truncate with "
                "pack_with_languages(max_length=...); the trainer's max_length does not shorten extra columns."
            )
        if LANGUAGE_NAMES not in example:
            raise UserValueError(
                f"A row has {TOKEN_LANGUAGES!r} but no {LANGUAGE_NAMES!r}; make such data with pack_with_languages."
            )
        return torch.tensor([self.language.id(name) for name in example[LANGUAGE_NAMES]])[local]


def _real_tokens(lengths: list[int], batch: Mapping[str, Any]) -> Tensor:
    """Positions of the rows' tokens in a batch, beside padding on any side or one after another: bool `[B, T]`."""
    input_ids = batch["input_ids"]
    attention_mask = batch.get("attention_mask")
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        real: Tensor = attention_mask.bool()
        counts = real.sum(1).tolist()
        if counts != lengths:
            raise UserValueError(
                f"The collator made rows of {counts} tokens out of samples of {lengths}; truncate before collating."
            )
        return real
    if input_ids.shape[0] == 1 and sum(lengths) <= input_ids.shape[1]:
        return torch.arange(input_ids.shape[1])[None] < sum(lengths)
    raise UserValueError(
        f"Cannot find the tokens of samples of {lengths} tokens in a batch of shape {list(input_ids.shape)} without "
        "attention mask; use the trainer's own collator."
    )
