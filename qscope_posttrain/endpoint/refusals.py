"""Requests that an endpoint will never answer: for their words, which is their outcome, or for how they are sent."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatRequest, Completion
from qscope_posttrain.endpoint.failures import RequestFailed, RequestRefused

FIRST_FEW = 10
"""Requests of one way, all refused and not for certain for their words, after which the way is taken for the reason."""


class _Held(NamedTuple):
    key: str
    identity: Mapping[str, Any]
    request: ChatRequest
    completion: Completion
    content: bool


class Refusals:
    """What was refused, kept on disk as soon as the endpoint has answered another request of the same way.

    Until then nobody knows whether the words or an option is the reason, and a refusal on disk would outlive the
    option. Thread-safe.
    """

    def __init__(self, cache: CompletionCache, *, ask_again: bool = False) -> None:
        """With `ask_again`, refusals on disk count for nothing."""
        self._cache, self._ask_again = cache, ask_again
        self._found: dict[str, Completion] = {}
        self._held: dict[str, list[_Held]] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Completion | None:
        """The refusal known by `ChatRequest.refusal_key`, if there is one."""
        return self._found.get(key) or (None if self._ask_again else self._cache.get(key))

    def add(
        self, key: str, identity: Mapping[str, Any], request: ChatRequest, way: str, failure: RequestRefused
    ) -> None:
        """Remember a refusal.

        Raises:
            RequestFailed: the first few requests of this way were all refused, and not for certain for their words.
        """
        completion = Completion("", "refused", 0, 0, "", str(failure))
        entry = _Held(key, identity, request, completion, failure.content)
        with self._lock:
            self._found[key] = completion
            if self._cache.has_answer(way):
                self._cache.put(key, identity, request, completion, way)
                return
            held = self._held.setdefault(way, [])
            held.append(entry)
            if sum(not entry.content for entry in held) >= FIRST_FEW:
                raise _all_refused(held)

    def answered(self, way: str) -> None:
        """Put the refusals of this way on disk: an answer has come, so their words were the reason."""
        with self._lock:
            for key, identity, request, completion, _ in self._held.pop(way, []):
                self._cache.put(key, identity, request, completion, way)

    def check(self, ways: Iterable[str]) -> None:
        """Raise a RequestFailed where all requests of one of these ways were refused."""
        for way in ways:
            if held := self._held.get(way):
                raise _all_refused(held)


def _all_refused(held: list[_Held]) -> RequestFailed:
    last = held[-1]
    advice = (
        ""
        if last.content
        else ". If that is about an option (--request-options, --max-tokens-name, --send-seed, temperature), change it"
    )
    return RequestFailed(
        f"the endpoint refused all of {len(held)} requests and has answered none like them: {last.completion.refusal}"
        f"{advice}. These refusals are not kept: the next run asks again.",
        retry=False,
    )
