"""Limits on requests: rate, budget of requests and tokens, and retries."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from qscope_posttrain.endpoint.chat import RequestFailed
from qscope_posttrain.errors import UserValueError


class BudgetSpent(UserValueError):
    """The request or token budget ran out. Answers received so far are cached."""


@dataclass(frozen=True)
class Limits:
    """Limits of one run; None is no limit."""

    requests_per_minute: float | None = None
    """Requests are sent at even intervals, retries included"""
    max_requests: int | None = None
    """Maximum number of requests, retries included; answers from the cache count too, so that a resumed run sends only
    the rest"""
    max_tokens: int | None = None
    """Send no request once prompts and answers so far, those from the cache included, have this many tokens. Requests
    in flight can exceed it. Cached answers are never withheld."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "max_requests", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserValueError(f"{name} must be positive, or None for no limit; got {value}.")


@dataclass(frozen=True)
class RetryPolicy:
    """Number of attempts, and the pauses between them: exponential with jitter, or as the server asks."""

    attempts: int = 6
    """Maximum number of attempts, the first included"""
    first_wait: float = 1.0
    """Seconds before the second attempt; doubled for each further one"""
    longest_wait: float = 60.0
    """Maximum length of a pause of our own choice, in seconds"""
    longest_retry_after: float = 300.0
    """Maximum pause that a server may ask for, in seconds; where it asks for more, the run ends and can be resumed"""

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
    """Seconds that a `Retry-After` header asks for, as a number or an HTTP date; None where it is neither."""
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


class Pace:
    """Sends requests at even intervals, and holds them all while the server asks for a pause. Thread-safe."""

    def __init__(self, per_minute: float | None, sleep: Callable[[float], None] = time.sleep) -> None:
        self._distance = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._sleep = sleep
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when the next request may be sent."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._distance
        if turn > now:
            self._sleep(turn - now)

    def hold(self, seconds: float) -> None:
        """Start no further request within the next `seconds`."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Usage:
    """Requests and tokens used so far, checked against the limits. Thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sent = 0
        """Requests sent, retries included"""
        self.failed = 0
        """Requests sent that brought neither an answer nor a refusal"""
        self.cached = 0
        """Answers and refusals taken from the cache, each counted once"""
        self.refused = 0
        """Requests that the endpoint will not answer, sent now or known from the cache, each counted once"""
        self.first_refusal = ""
        """Message of the endpoint about the first of them"""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._lock = threading.Lock()

    @property
    def requests(self) -> int:
        """Requests that count towards the budget."""
        return self.sent + self.cached

    @property
    def tokens(self) -> int:
        """Tokens that count towards the budget."""
        return self.prompt_tokens + self.completion_tokens

    def reserve(self, count: int = 1) -> None:
        """Count requests about to be sent together, or raise `BudgetSpent` and count nothing if they are too many."""
        with self._lock:
            for name, used in (("max_requests", self.requests + count), ("max_tokens", self.tokens + 1)):
                limit = getattr(self.limits, name)
                if limit is not None and used > limit:
                    raise BudgetSpent(
                        f"the budget {name}={limit} is spent; the answers so far are kept. Raise it and run the same "
                        "command again to continue."
                    )
            self.sent += count

    def add(self, prompt_tokens: int, completion_tokens: int, *, cached: bool = False) -> None:
        """Count the tokens of an answer. A cached one is counted as a request too, but no budget withholds it."""
        with self._lock:
            self.cached += cached
            self.prompt_tokens += prompt_tokens
            self.completion_tokens += completion_tokens

    def fail(self, count: int = 1) -> None:
        """Count requests that brought no answer."""
        with self._lock:
            self.failed += count

    def refuse(self, reason: str) -> None:
        """Count a request that the endpoint will not answer."""
        with self._lock:
            self.refused += 1
            self.first_refusal = self.first_refusal or reason

    def to_dict(self) -> dict[str, int]:
        """The counts, JSON-ready."""
        names = ("requests", "sent", "failed", "refused", "cached", "tokens", "prompt_tokens", "completion_tokens")
        return {name: getattr(self, name) for name in names}
