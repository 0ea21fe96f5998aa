"""Stand-ins of study 7: a chat model whose answers are begun for it, and none at all, but a list of tokens."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qscope_posttrain.endpoint.chat import ChatCompletion, ChatRequest
from qscope_posttrain.endpoint.models import LocalChatModel

LONGEST = {"[": 32, "{": 64}
"""Tokens of a list, and of an object, that are waited for"""


class Begun(LocalChatModel):
    """A local model whose answers begin as the last message asks, with the brackets and the key of the JSON, and whose
    text ends where its line or the quotation does, as constrained decoding would have it."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        wrapped: Any = WithBeginnings(tokenizer)
        super().__init__(model, wrapped, name=name)

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatCompletion]:
        """See `ChatModel.complete`."""
        begun = [beginning(request.messages[-1].content) for request in requests]
        shorter = [
            replace(request, sampling=replace(request.sampling, max_tokens=LONGEST[start[0]])) if start else request
            for request, start in zip(requests, begun, strict=True)
        ]
        found = super().complete(shorter)
        return [replace(answer, text=whole(start, answer.text)) for answer, start in zip(found, begun, strict=True)]


def whole(start: str, text: str) -> str:
    """An answer that was begun; a text in quotation marks is closed."""
    if not start.endswith('"'):
        return start + text
    (key,) = json.loads(f'{start}"}}')
    return json.dumps({key: re.split(r'["\n]', text)[0].strip()}, ensure_ascii=False)


class WithBeginnings:
    """A tokenizer whose chats end with the beginning of the answer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options)

    def apply_chat_template(self, turns: Sequence[Mapping[str, str]], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(turns, **options)) + beginning(turns[-1]["content"])


def beginning(content: str) -> str:
    """How the answer to a message begins that says "Answer with JSON only: ..."; empty for another message."""
    found = re.search(r'Answer with JSON only: (a list of|\{"(\w+)": ("?))[^\n]*\Z', content.strip())
    if found is None:
        return ""
    return "[" if found[2] is None else f'{{"{found[2]}": {found[3]}'


class Tokens:
    """Stands in for a chat model: an explanation is the list of the eight tokens that were marked most, and a passage
    fits it if one of them occurs there, or, where passages have marks, if most marks are of them."""

    batch_size, concurrency = 64, 1
    identity: Mapping[str, Any] = {"name": "tokens"}
    route: Mapping[str, Any] = {}

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatCompletion]:
        """See `ChatModel.complete`."""
        return [ChatCompletion(self.answer(r.messages[-1].content), "stop", 0, 0, "") for r in requests]

    def answer(self, content: str) -> str:
        if "Description:" not in content:
            counts = Counter(map(cleaned, marks(content.rsplit('"}\n\n', 1)[-1])))  # not those of the examples
            words = [word for word, _ in counts.most_common() if word][:8]
            return json.dumps({"explanation": "one of " + ", ".join(f"'{word}'" for word in words or ["?"])})
        asked = content.rsplit("Description: ", 1)[1]  # behind the examples
        words = re.findall(r"'([^']+)'", asked.splitlines()[0])
        passages = [json.loads(line.split(". ", 1)[1]) for line in asked.splitlines() if re.match(r'\d+\. "', line)]
        return json.dumps([int(fits(passage, words)) for passage in passages])


def marks(text: str) -> list[str]:
    """What stands between << and >>."""
    return re.findall(r"<<(.*?)>>", text)


def cleaned(token: str) -> str:
    """A token in small letters, with the space before it, which tells a word from a part of one."""
    return token.rstrip().lower().replace("'", "")


def fits(passage: str, words: Sequence[str]) -> bool:
    """Whether a passage fits a list of tokens (see `Tokens`): a whole word, or a part of one."""
    if found := [cleaned(mark).strip() for mark in marks(passage)]:
        known = {word.strip() for word in words}
        return sum(mark in known for mark in found) * 2 > len(found)
    text = cleaned(passage)
    return any(
        re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)" if word.startswith(" ") else re.escape(word), text)
        for word in words
    )
