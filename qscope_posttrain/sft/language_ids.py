"""The language of every token of a batch: decided per sample, carried through padding, flattening and packing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import regex
import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sft.masks import IGNORED_LABEL, PADDING_ID
from qscope_posttrain.text.language import language_by_evidence, prose, script_evidence
from qscope_posttrain.text.language_labels import language_hint, listed, same_language

TOKEN_LANGUAGES = "language_ids"
"""Column of packed data sets: index of each token's language in the row's `LANGUAGE_NAMES`"""
LANGUAGE_NAMES = "language_names"
"""Column of packed data sets: the names behind `TOKEN_LANGUAGES`"""
SCRIPT = "script"
NO_LANGUAGE = "zxx"
"""ISO 639-2 for "no linguistic content": such a sample takes no part"""

LanguageRule = str | Callable[[Mapping[str, Any]], str]


class SampleLanguage:
    """Decides the language of one sample; picklable unless the rule is not.

    Args:
        rule: the name of a column, "script", or a callable that takes the example and returns the language. "script"
            goes by the letters of the response, the tokens that carry the loss (see `response_texts`), without code
            and formulas (see `language_by_script`). A response without letters has the language of the whole sample,
            and a sample without letters takes no part.
        languages: known languages; a sample in another one is an error, also where it only spells one of them
            otherwise ("zh-CN").
        ignore: further languages, whose samples take no part. `NO_LANGUAGE` is always one.
        decode: from token ids to text, needed by "script" for samples that carry labels or have no text.
        classes: the names behind the numbers of a ClassLabel column.
    """

    def __init__(
        self,
        rule: LanguageRule,
        languages: Sequence[str],
        ignore: Collection[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.rule = rule
        self.languages = tuple(languages)
        self.ignore = frozenset(ignore)
        self.decode = decode
        self.classes = tuple(classes)
        self._ids = dict.fromkeys([NO_LANGUAGE, *self.ignore], PADDING_ID)
        self._ids |= {name: i for i, name in enumerate(self.languages) if name not in self.ignore}

    def __call__(self, example: Mapping[str, Any]) -> str:
        """The language's name, of which `id` is not asked yet.

        Raises:
            ValueError: it cannot be told, with the remedy.
        """
        if callable(self.rule):
            return self.name(self.rule(example))
        if self.rule == SCRIPT:
            return self._by_script(example)
        if self.rule not in example:
            raise UserValueError(
                f"A training sample has no column {self.rule!r} (its columns: {', '.join(example)}). Add it to "
                'the data set, or pass language="script" or a function of the example.'
            )
        return self.name(example[self.rule])

    def name(self, label: Any) -> str:
        """The name that a column or a function gave.

        Raises:
            ValueError: no name, a number without a name behind it, or nothing.
        """
        if self.classes and hasattr(label, "__index__"):  # formats of `datasets` give numbers as tensors
            label = operator.index(label)
            if 0 <= label < len(self.classes):
                return self.classes[label]
        if isinstance(label, str) and label.strip():
            return label
        numbered = isinstance(self.rule, str) and isinstance(label, int) and not isinstance(label, bool)
        remedy = (
            "For a ClassLabel column of `datasets`, whose names have been lost, give the names: "
            f'language=lambda example: names[example["{self.rule}"]].'
            if numbered
            else f"Fill it in, leave the row out, or call it {NO_LANGUAGE!r} to leave it without penalty."
        )
        raise UserValueError(
            f"The language of a sample must be a name such as 'en'; {self.rule!r} gave {label!r}. {remedy}"
        )

    def id(self, language: str) -> int:
        """Index of a language, or `PADDING_ID` where it is ignored.

        Raises:
            ValueError: an unknown language; the message lists the known ones.
        """
        if language in self._ids:
            return self._ids[language]
        known = [*self.languages, *sorted(self.ignore)]
        column = self.rule if isinstance(self.rule, str) and self.rule != SCRIPT else "language"
        meant = same_language(language, known)
        remedy = (
            f'Call it so in the data, as by dataset.map(lambda row: {{"{column}": {{{language!r}: {meant!r}}}'
            f'.get(row["{column}"], row["{column}"])}}), or'
            if meant is not None
            else f"Find features with texts of {language!r} too (a loss without features: name all in languages), or"
        )
        raise UserValueError(
            f"A training sample is in language {language!r}, which is not one of the known languages (those of the "
            f"FeatureSet, or languages=...): {listed(self.languages)}.{language_hint(language, known)} {remedy} "
            f"pass ignore_languages=({language!r},) to leave such samples without penalty."
        )

    def _by_script(self, example: Mapping[str, Any]) -> str:
        if SCRIPT in example:
            raise UserValueError(
                "language=\"script\" decides by the letters of the text, but the data also has a column 'script'. "
                "Rename or remove the column, or, if it has the language, pass "
                'language=lambda example: example["script"].'
            )
        known = [*self.languages, *sorted(self.ignore - set(self.languages))]
        for place, text in enumerate(response_texts(example, self.decode)):
            evidence = script_evidence(text)
            most = list(evidence.items())[:2]
            if not most or (len(most) == 2 and most[0][1] == most[1][1]):
                continue  # no letters, or two scripts alike
            language = language_by_evidence(evidence, known)
            if language is not None:
                return language
            if place == 0:
                raise UserValueError(
                    f"The script of {text.strip()[:60]!r} ({most[0][0]}) does not decide between {listed(known)}. Give "
                    "the language in a column or by a function of the example, or name it in ignore_languages."
                )
        return NO_LANGUAGE


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
        lengths = [_length(example) for example in examples]
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
        ids = torch.tensor([self.language.id(name) for name in example[LANGUAGE_NAMES]])
        return ids[local]


def _length(example: Mapping[str, Any]) -> int:
    if "input_ids" not in example:
        raise UserValueError(
            f"Expected tokenised samples with 'input_ids', got the columns {', '.join(example)}. "
            "Vision data sets, which TRL tokenises in the collator, are not supported."
        )
    return len(example["input_ids"])


def _real_tokens(lengths: list[int], batch: Mapping[str, Any]) -> Tensor:
    """Where the collator put the rows' tokens, in their order: beside padding on any side, or one after another.

    Bool, of the shape of `input_ids`.
    """
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
        f"Cannot tell where a batch of shape {list(input_ids.shape)} without attention mask holds the tokens of "
        f"samples of {lengths} tokens; use the trainer's own collator."
    )


_MASKS = ("completion_mask", "assistant_masks")
_TURNS = ("messages", "conversations", "completion", "prompt")
_ASSISTANT = ("assistant", "model", "gpt", "chatbot", "bot")
_ROLE = "|".join((*_ASSISTANT, "system", "user", "human", "developer", "tool"))
# A conversation in the text or tokens: ChatML, Llama 3, Gemma, Phi and Zephyr.
_RENDERED = regex.compile(
    rf"<(?:\|im_start\||\|start_header_id\||start_of_turn|\|(?={_ROLE}))>?\s*(?P<role>{_ROLE})(?:<\|end_header_id\|>|\|>)?"
    r"(?P<content>.*?)(?=<(?:\|im_end\||\|eot_id\||end_of_turn|\|end\||/s)>|<\|im_start\||<start_of_turn|\Z)",
    regex.DOTALL,
)
# What is left of a turn's header where its marks are tokens of their own.
_ROLE_LINE = regex.compile(rf"^\W*(?:{_ROLE})\W*$", regex.MULTILINE)
# A template may have written the opening mark, so that the response begins within the thought.
_THOUGHT = regex.compile(r"(?:<think(?:ing)?>|\A)(?:(?!<think(?:ing)?>).)*?</think(?:ing)?>", regex.DOTALL)


def response_texts(example: Mapping[str, Any], decode: Callable[[list[int]], str] | None = None) -> Iterator[str]:
    """Texts that decide the language of a sample's response, best first; each may be without letters.

    1. The response without code, formulas and marks of templates, and without `<think>` blocks if letters are left: a
       model may think in another language than the one it answers in. The response is what carries the loss: tokens
       with labels, or under `completion_mask` and `assistant_masks`. Where all tokens carry it, or the sample is not
       tokenised, the assistant's turns of a conversation, the completion, or the whole text.
    2. The whole sample without them.
    3. The response, then the whole sample, as they are.

    Args:
        example: in any of TRL's data set types (text, messages, prompt and completion), with its tokens or without.
        decode: from token ids to text, with their special tokens.
    """
    response = _response(example, decode)
    answer = prose(_THOUGHT.sub("", response))
    yield answer if any(character.isalpha() for character in answer) else prose(response)
    whole = _whole(example, decode)
    yield prose(_ROLE_LINE.sub("", whole))
    yield response
    yield whole


def _response(example: Mapping[str, Any], decode: Callable[[list[int]], str] | None) -> str:
    ids = list(example.get("input_ids") or ())
    learned = _learned(example, len(ids))
    # Nothing predicts the first token of a document, which some collators leave without a label.
    if ids and decode is not None and not all(learned[1:]):
        return _assistant_turns(decode([token for token, flag in zip(ids, learned, strict=False) if flag]))
    for column in ("messages", "conversations", "completion"):
        if example.get(column):
            return _contents(example[column], _ASSISTANT)
    return _assistant_turns(_whole(example, decode))


def _assistant_turns(text: str) -> str:
    """A text without the turns of others and the headers of turns, where a template has marked them."""
    own = _RENDERED.sub(lambda turn: turn["content"] if turn["role"] in _ASSISTANT else "\n", text)
    return _ROLE_LINE.sub("", own)


def _learned(example: Mapping[str, Any], tokens: int) -> list[bool]:
    """Which tokens carry the loss."""
    if example.get("labels") is not None:
        return [label != IGNORED_LABEL for label in example["labels"]]
    masks = [example[mask] for mask in _MASKS if example.get(mask) is not None]
    return [all(flags) for flags in zip(*masks, strict=False)] if masks else [True] * tokens


def _whole(example: Mapping[str, Any], decode: Callable[[list[int]], str] | None) -> str:
    parts = [_contents(example[column]) for column in ("text", *_TURNS) if example.get(column)]
    if not any(parts) and decode is not None and example.get("input_ids") is not None:
        return decode(list(example["input_ids"]))
    return "\n".join(parts)


def _contents(value: str | Sequence[Mapping[str, Any]], roles: Sequence[str] | None = None) -> str:
    """A text as it is, or the contents of the turns of these roles, one below the other."""
    if isinstance(value, str):
        return value
    texts: list[str] = []
    for turn in value:
        if roles is None or (turn.get("role") or turn.get("from")) in roles:
            content = turn.get("content") or turn.get("value") or ""
            parts = [{"text": content}] if isinstance(content, str) else content
            texts += [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "\n".join(texts)
