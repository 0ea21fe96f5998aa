"""The language of a sample: a column, a function, or the script of its response."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import regex

from qscope_posttrain.errors import UserValueError, listed
from qscope_posttrain.sft.masks import IGNORED_LABEL, PADDING_ID
from qscope_posttrain.text.scripts import (
    language_by_evidence,
    language_hint,
    prose,
    same_language,
    script_evidence,
)

SCRIPT = "script"
NO_LANGUAGE = "zxx"  # ISO 639-2 for "no linguistic content": such a sample takes no part

LanguageRule = str | Callable[[Mapping[str, Any]], str]


class SampleLanguage:
    """Decides the language of one sample; picklable unless the rule is not.

    Args:
        rule: the name of a column, "script", or a callable that takes the example and returns the language. "script"
            goes by the letters of the response, the tokens that carry the loss (see `response_texts`), without code
            and formulas (see `script_evidence`). A response without letters has the language of the whole sample,
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
        """The language's name, known or not (see `id`).

        Raises:
            ValueError: it cannot be decided, with the remedy.
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
        """The name that a column or a function gave; ValueError for anything that is no name, and no ClassLabel."""
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
        """Index of a language, or `PADDING_ID` where it is ignored; ValueError for an unknown one."""
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
       tokenized, the assistant's turns of a conversation, the completion, or the whole text.
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
    ids = [] if example.get("input_ids") is None else list(example["input_ids"])
    masks = [example[mask] for mask in _MASKS if example.get(mask) is not None]
    learned = [all(flags) for flags in zip(*masks, strict=False)] if masks else [True] * len(ids)
    if example.get("labels") is not None:
        learned = [label != IGNORED_LABEL for label in example["labels"]]
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


def _whole(example: Mapping[str, Any], decode: Callable[[list[int]], str] | None) -> str:
    parts = [_contents(example[column]) for column in ("text", *_TURNS) if example.get(column)]
    if not any(parts) and decode is not None and example.get("input_ids") is not None:
        return decode(list(example["input_ids"]))
    return "\n".join(parts)


def _contents(value: str | Sequence[Mapping[str, Any]], roles: Sequence[str] | None = None) -> str:
    """A text as it is, or the contents of the turns of these roles, joined by line breaks."""
    if isinstance(value, str):
        return value
    texts: list[str] = []
    for turn in value:
        if roles is None or (turn.get("role") or turn.get("from")) in roles:
            content = turn.get("content") or turn.get("value") or ""
            parts = [{"text": content}] if isinstance(content, str) else content
            texts += [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "\n".join(texts)
