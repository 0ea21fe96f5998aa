"""Failed requests: which are worth another try, and after how long."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatRequest, Completion
from qscope_posttrain.errors import UserOSError, UserValueError


class RequestFailed(UserOSError):
    """A request that brought no answer. An OSError: the outside world failed, not the program."""

    def __init__(self, message: str, *, retry: bool, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry = retry
        """Whether the same request may succeed later"""
        self.retry_after = retry_after
        """Seconds that the server asked to wait, if it did"""


class RequestRefused(RequestFailed):
    """One request that the endpoint will never answer, while it may answer others."""

    def __init__(self, message: str, *, content: bool) -> None:
        super().__init__(message, retry=False)
        self.content = content
        """Whether its words are known to be the reason, rather than the way in which it was sent"""


class BudgetSpent(UserValueError):
    """The requests or tokens that a run may use are used; every answer so far is in the cache."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request is sent, and the pause between: exponential with jitter, or what the server asks for."""

    attempts: int = 6
    """Times that one request is sent at most, the first included"""
    first_wait: float = 1.0
    """Seconds before the second attempt; doubled for each further one"""
    longest_wait: float = 60.0
    """Seconds that a pause of our own choice lasts at most"""
    longest_retry_after: float = 300.0
    """Seconds that a server may ask to wait; where it asks for more, the run ends and can be resumed later"""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise UserValueError(f"attempts must be at least 1; got {self.attempts}.")
        if min(self.first_wait, self.longest_wait, self.longest_retry_after) < 0:
            raise UserValueError("pauses cannot be negative.")

    def wait(self, attempt: int, failure: RequestFailed) -> float | None:
        """Seconds before the next attempt after failed attempt number `attempt` (from 1), or None to give up."""
        if not failure.retry or attempt >= self.attempts:
            return None
        if failure.retry_after is not None:
            return failure.retry_after if failure.retry_after <= self.longest_retry_after else None
        wait = min(self.first_wait * 2 ** (attempt - 1), self.longest_wait)
        return wait * random.uniform(0.5, 1.0)  # spreads clients out; no result depends on it


def retry_after_seconds(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number, or an HTTP date; None where it says neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        seconds = (when - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if seconds == seconds else None


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
