"""Failed requests: which are worth another try, and after how long."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

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
