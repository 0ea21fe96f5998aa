"""The language of every token of a batch: decided per sample, carried through padding, flattening and packing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sft.masks import PADDING_ID
from qscope_posttrain.text.language import language_by_script

TOKEN_LANGUAGES = "language_ids"
"""Column of packed data sets: index of each token's language in the row's `LANGUAGE_NAMES`"""
LANGUAGE_NAMES = "language_names"
"""Column of packed data sets: the names behind `TOKEN_LANGUAGES`"""

LanguageRule = str | Callable[[Mapping[str, Any]], str]


def example_text(example: Mapping[str, Any]) -> str | None:
    """The text of a sample in any of TRL's data set types (text, messages, prompt and completion), or None."""
    parts: list[str] = []
    for column in ("text", "messages", "prompt", "completion"):
        value = example.get(column)
        if isinstance(value, str):
            parts.append(value)
        elif isinstance(value, list):
            parts += [turn["content"] for turn in value if isinstance(turn.get("content"), str)]
    return "\n".join(parts) or None


class SampleLanguage:
    """Decides the language of one sample; picklable unless the rule is not.

    Args:
        rule: the name of a column, "script" (decided by the letters of the text, or of the decoded `input_ids` where
            the text column is gone), or a callable that takes the example and returns the language.
        languages: known languages; a sample in another one is an error.
        ignore: further languages, whose samples take no part.
        decode: from token ids to text, needed by "script" only for samples without text.
    """

    def __init__(
        self,
        rule: LanguageRule,
        languages: Sequence[str],
        ignore: Collection[str] = (),
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.rule = rule
        self.languages = tuple(languages)
        self.ignore = frozenset(ignore)
        self.decode = decode
        self._ids = {name: i for i, name in enumerate(self.languages)} | dict.fromkeys(self.ignore, PADDING_ID)

    def __call__(self, example: Mapping[str, Any]) -> str:
        """The language's name.

        Raises:
            ValueError: it cannot be told, with the remedy.
        """
        if callable(self.rule):
            language = self.rule(example)
        elif self.rule == "script":
            language = self._by_script(example)
        else:
            if self.rule not in example:
                raise UserValueError(
                    f"A training sample has no column {self.rule!r} (its columns: {', '.join(example)}). Add it to "
                    'the data set, or pass language="script" or a function of the example.'
                )
            language = example[self.rule]
        if not isinstance(language, str):
            raise UserValueError(
                f"The language of a sample must be a name such as 'en'; {self.rule!r} gave {language!r}."
            )
        return language

    def id(self, language: str) -> int:
        """Index of a language, or `PADDING_ID` where it is ignored.

        Raises:
            ValueError: an unknown language; the message lists the known ones.
        """
        if language not in self._ids:
            raise UserValueError(
                f"A training sample is in language {language!r}, of which the FeatureSet has no statistics; it has "
                f"{', '.join(self.languages)}. Find features with texts of {language!r} too, or pass "
                f"ignore_languages=({language!r},) to leave such samples without penalty."
            )
        return self._ids[language]

    def _by_script(self, example: Mapping[str, Any]) -> str:
        text = example_text(example)
        if text is None:
            if self.decode is None:
                raise UserValueError(f"No text to decide the language by, among the columns {', '.join(example)}.")
            text = self.decode(list(example["input_ids"]))
        language = language_by_script(text, [*self.languages, *sorted(self.ignore)])
        if language is None:
            raise UserValueError(
                f"The script of {text[:60]!r} does not decide between {', '.join(self.languages)}. Give the language "
                "in a column, or by a function of the example."
            )
        return language


class LanguageCollator:
    """Wraps a collator of `SFTTrainer` and adds the language of every token to its batches.

    Adds `batch[key]`, int64, of the shape of `input_ids`: an index into `SampleLanguage.languages`, or -1 for padding
    and ignored languages. A sample's language holds for all its tokens; rows of `pack_with_languages` bring one per
    token.

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

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        rows = [self._token_ids(example) for example in examples]
        batch = self.inner([{k: v for k, v in example.items() if k not in self.drop} for example in examples])
        batch[self.key] = _place(rows, batch)
        return batch

    def _token_ids(self, example: Mapping[str, Any]) -> Tensor:
        """[tokens] language ids of one row of the data set."""
        if "input_ids" not in example:
            raise UserValueError(
                f"Expected tokenised samples with 'input_ids', got the columns {', '.join(example)}. "
                "Vision data sets, which TRL tokenises in the collator, are not supported."
            )
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
        ids = torch.tensor([self.language.id(name) for name in example[LANGUAGE_NAMES]])
        return ids[local]


def _place(rows: list[Tensor], batch: Mapping[str, Any]) -> Tensor:
    """Put per-row ids where the collator put the rows' tokens: beside padding on any side, or one after another."""
    input_ids = batch["input_ids"]
    ids = torch.full_like(input_ids, PADDING_ID)
    attention_mask = batch.get("attention_mask")
    flat = torch.cat(rows)
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        real = attention_mask.bool()
        counts = real.sum(1).tolist()
        if counts != [len(row) for row in rows]:
            raise UserValueError(
                f"The collator made rows of {counts} tokens out of samples of {[len(row) for row in rows]}; "
                "truncate before collating."
            )
        ids[real] = flat
    elif input_ids.shape[0] == 1 and len(flat) <= input_ids.shape[1]:
        ids[0, : len(flat)] = flat
    else:
        raise UserValueError(
            f"Cannot tell where a batch of shape {list(input_ids.shape)} without attention mask holds the tokens of "
            f"samples of {[len(row) for row in rows]} tokens; use the trainer's own collator."
        )
    return ids
