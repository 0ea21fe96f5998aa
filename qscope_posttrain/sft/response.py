"""The text of a sample that carries the loss: what "script" decides the language by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import regex

from qscope_posttrain.sft.masks import IGNORED_LABEL
from qscope_posttrain.text.language import prose

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
