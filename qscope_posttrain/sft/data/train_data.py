"""Languages of training data: counted row by row, and carried by the trainer's collator to every token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Value
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import if_many, progress
from qscope_posttrain.sft.data.language_ids import NO_LANGUAGE, SCRIPT, SampleLanguage
from qscope_posttrain.sft.masks import PADDING_ID, TokenBatch
from qscope_posttrain.text.scripts import distinct_labels

TOKEN_LANGUAGES = "language_ids"
"""Column of packed data sets: index of each token's language in the row's `LANGUAGE_NAMES`"""
LANGUAGE_NAMES = "language_names"  # Column of packed data sets: the names behind `TOKEN_LANGUAGES`


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
    """The language of every row, by name; ValueError for one that `decide` does not know, if it knows any."""
    return each_row(rows, lambda row: _known(decide, decide(row)), total)


def _known(decide: SampleLanguage, language: str) -> str:
    if decide.languages:
        decide.id(language)
    return language


def each_row(rows: Iterable[Any], look: Callable[[Any], Any], total: int | None = None) -> list[Any]:
    """`look(row)` of every row, with a progress bar; errors name the row. `total`: their number, without a length."""
    total = len(rows) if isinstance(rows, Sized) else total
    shown = progress(rows, total, "looking at languages", if_many(total))
    return [_at(number, look, row) for number, row in enumerate(shown)]


def _at(number: int, look: Callable[[Any], Any], value: Any) -> Any:
    try:
        return look(value)
    except UserValueError as error:
        raise UserValueError(f"Row {number} of the training data: {error}") from error


def languages_of_documents(batch: Mapping[str, Any], decide: SampleLanguage) -> Tensor:
    """Language ids `[batch, tokens]` by the labeled tokens of each document; -1 where a document has none."""
    tokens = TokenBatch.from_inputs(batch, None)
    documents, mask = tokens.documents(), batch.get("attention_mask")
    real = torch.ones_like(tokens.starts) if mask is None or mask.shape != documents.shape else mask.bool()
    ids = torch.full_like(documents, PADDING_ID)
    for number in documents[tokens.labeled()].unique().tolist():
        here = real & (documents == number)
        text = {"input_ids": batch["input_ids"][here].tolist(), "labels": tokens.labels[here].tolist()}
        ids[here] = decide.id(decide(text))
    return ids


class LanguageCollator:
    """Wraps a trainer's collator and adds the language of every token to its batches.

    Adds `batch[key]`, int64, of the shape of `input_ids`: an index into `SampleLanguage.languages`, or -1 for padding
    and ignored languages. A sample's language holds for all its tokens; rows of `pack_with_languages` bring one per
    token. The rule "script" goes by the labels that `inner`, the trainer's own collator, has made.

    Args:
        drop: columns that were kept in the data set for the language only, and that `inner` must not see.
        documents: whether the labeled tokens of each document in the batch decide, whatever the samples hold.
    """

    def __init__(
        self,
        inner: Callable[[list[dict[str, Any]]], Any],
        language: SampleLanguage,
        key: str,
        drop: Iterable[str] = (),
        documents: bool = False,
    ) -> None:
        self.inner = inner
        self.language = language
        self.key = key
        self.drop = frozenset(drop)
        self.documents = documents
        self._read = 0

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        kept = examples  # also where a trainer has nested them
        if self.drop:
            kept = [{name: value for name, value in row.items() if name not in self.drop} for row in examples]
        if self.documents:
            batch = self.inner(kept)
            if len(batch["input_ids"]) < len(examples) and batch.get("position_ids") is None:
                raise UserValueError(
                    f"The collator puts {len(examples)} samples into {len(batch['input_ids'])} rows without position "
                    "ids that tell where each begins, so that their languages are not known. Let it return them."
                )
            batch[self.key] = languages_of_documents(batch, self.language)
            return batch
        for example in examples:
            if "input_ids" not in example:
                raise UserValueError(
                    f"Expected tokenized samples with 'input_ids', got the columns {', '.join(example)}: of texts that "
                    "only the collator tokenizes, as TRL's does for vision data, the languages are not known."
                )
        lengths = [len(example["input_ids"]) for example in examples]
        batch = self.inner(kept)
        real = _real_tokens(lengths, batch)
        tokens = torch.cat([torch.as_tensor(example["input_ids"]) for example in examples])
        if not torch.equal(batch["input_ids"][real], tokens.to(batch["input_ids"])):
            raise UserValueError(
                "The collator changes tokens, reorders samples, or pads on the left without an attention mask, so that "
                "the language of each token is not known. Let it keep tokens and order, and return the attention mask."
            )
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
                f"The collator made rows of {counts} tokens out of samples of {lengths}. Let it keep samples whole and "
                "in order; truncate before collating."
            )
        return real
    if lengths == [input_ids.shape[1]] * input_ids.shape[0]:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if input_ids.shape[0] == 1 and sum(lengths) <= input_ids.shape[1]:
        return torch.arange(input_ids.shape[1])[None] < sum(lengths)
    raise UserValueError(
        f"Cannot find the tokens of samples of {lengths} tokens in a batch of shape {list(input_ids.shape)} without "
        "attention mask; use the trainer's own collator."
    )
