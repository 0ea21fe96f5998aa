"""How fast and how much: requests a minute, and a budget of requests and tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from qscope_posttrain.endpoint.failures import BudgetSpent
from qscope_posttrain.errors import UserValueError


@dataclass(frozen=True)
class Limits:
    """What one run may do to an endpoint; None is no limit."""

    requests_per_minute: float | None = None
    """Sent at even distances, further attempts included"""
    max_requests: int | None = None
    """No request is sent beyond so many, further attempts included; answers taken from the cache count too, so that a
    resumed run sends no more than was left"""
    max_tokens: int | None = None
    """No request is sent once the answers so far, those from the cache included, count so many tokens of prompt and
    answer. Requests under way can overstep it. What is in the cache is never withheld."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "max_requests", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserValueError(f"{name} must be positive, or None for no limit; got {value}.")


class Pace:
    """Keeps requests at even distances, and all of them waiting while the server asks for a pause. Thread-safe."""

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
        """Let no further request start within the next `seconds`."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Usage:
    """What a run has used so far, checked against its limits. Thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sent = 0
        """Requests sent, further attempts included"""
        self.failed = 0
        """Requests sent that brought neither an answer nor a refusal"""
        self.cached = 0
        """Answers and refusals taken from the cache, each counted once"""
        self.refused = 0
        """Requests that the endpoint will not answer, sent now or known from the cache, each counted once"""
        self.first_refusal = ""
        """What the endpoint said of the first of them"""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._lock = threading.Lock()

    @property
    def requests(self) -> int:
        """What the budget of requests counts."""
        return self.sent + self.cached

    @property
    def tokens(self) -> int:
        """What the budget of tokens counts."""
        return self.prompt_tokens + self.completion_tokens

    def reserve(self, count: int = 1) -> None:
        """Count requests about to be sent together.

        Raises:
            BudgetSpent: that would be too many; nothing is counted.
        """
        with self._lock:
            for name, used in (("max_requests", self.requests + count), ("max_tokens", self.tokens + 1)):
                limit = getattr(self.limits, name)
                if limit is not None and used > limit:
                    raise BudgetSpent(
                        f"the budget {name}={limit} is spent; the answers so far are kept. Raise it and run the same "
                        "command again: it goes on from there."
                    )
            self.sent += count

    def take(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count an answer from the cache, which no budget withholds: it is paid for."""
        with self._lock:
            self.cached += 1
        self.add(prompt_tokens, completion_tokens)

    def add(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of an answer."""
        with self._lock:
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
