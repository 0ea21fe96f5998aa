"""Ask a chat model with a cache, retries, a rate limit and a budget, several requests at a time."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, NamedTuple, TypeVar

from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatCompletion, ChatModel, ChatRequest, RequestFailed, RequestRefused
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import progress

T = TypeVar("T")
FIRST_WAIT = 1.0  # Seconds before the second attempt; doubled for each further one
LONGEST_WAIT = 60.0  # Maximum length of a pause of our own choice, in seconds
REDRAWN_AT = 0.7  # Temperature of further draws of a request that was greedy
LONGEST_RETRY_AFTER = 300.0
"""Maximum pause that a server may ask for, in seconds; where it asks for more, the run ends and can be resumed"""


class BudgetSpent(UserValueError):
    """The request or token budget ran out. Answers received so far are cached."""


@dataclass(frozen=True)
class Limits:
    """Limits of one run; None is no limit."""

    requests_per_minute: float | None = None  # Requests are sent at even intervals, retries included
    max_requests: int | None = None
    """Maximum number of requests, retries included; answers from the cache count too, so that a resumed run sends only
    the rest"""
    max_tokens: int | None = None
    """Send no request once prompts and answers so far, those from the cache included, have this many tokens. Requests
    in flight can exceed it. Cached answers are never withheld."""
    attempts: int = 6  # Maximum number of times that a request is sent

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise UserValueError(f"{field.name} must be positive; got {value}.")

    def pause(self, attempt: int, failure: RequestFailed) -> float | None:
        """Seconds before the next attempt after failed attempt number `attempt` (from 1), or None to give up: as the
        server asks, or else exponential with jitter."""
        if not failure.retry or attempt >= self.attempts:
            return None
        if failure.retry_after is not None:
            return failure.retry_after if failure.retry_after <= LONGEST_RETRY_AFTER else None
        wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
        return wait * random.uniform(0.5, 1.0)  # spreads clients out; no result depends on it


class Usage:
    """Requests and tokens used so far, held to the limits. Thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sent = 0  # Requests sent, retries included
        self.failed = 0  # Requests sent that brought neither an answer nor a refusal
        self.cached = 0  # Answers and refusals taken from the cache, each counted once
        self.refused = 0
        """Requests that the endpoint will not answer, sent now or known from the cache, each counted once"""
        self.first_refusal = ""  # Message of the endpoint about the first of them
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._next = 0.0  # The time at which the next request may be sent
        self._lock = threading.Lock()

    @property
    def requests(self) -> int:
        """Requests that count towards the budget."""
        return self.sent + self.cached

    @property
    def tokens(self) -> int:
        """Tokens that count towards the budget."""
        return self.prompt_tokens + self.completion_tokens

    def reserve(self, count: int, sleep: Callable[[float], Any] = time.sleep) -> None:
        """Wait until the next requests may be sent, and count them, or raise `BudgetSpent` if they are too many."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + (60.0 / self.limits.requests_per_minute if self.limits.requests_per_minute else 0.0)
        if turn > now:
            sleep(turn - now)
        with self._lock:
            for name, used in (("max_requests", self.requests + count), ("max_tokens", self.tokens + 1)):
                limit = getattr(self.limits, name)
                if limit is not None and used > limit:
                    raise BudgetSpent(
                        f"the budget {name}={limit} is spent; the answers so far are kept. Raise it and run the same "
                        "command again to continue."
                    )
            self.sent += count

    def hold(self, seconds: float) -> None:
        """Send no further request within the next `seconds`."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def add(self, completion: ChatCompletion, *, cached: bool = False) -> None:
        """Count an answer or a refusal. A cached one is counted as a request too, but no budget withholds it."""
        with self._lock:
            self.cached += cached
            self.prompt_tokens += completion.prompt_tokens
            self.completion_tokens += completion.completion_tokens
            if completion.refusal:
                self.refused += 1
                self.first_refusal = self.first_refusal or completion.refusal

    def fail(self, count: int) -> None:
        """Count requests that brought no answer."""
        with self._lock:
            self.failed += count

    def to_dict(self) -> dict[str, int]:
        """The counts, JSON-ready."""
        names = ("requests", "sent", "failed", "refused", "cached", "tokens", "prompt_tokens", "completion_tokens")
        return {name: getattr(self, name) for name in names}


def _draw(request: ChatRequest, draw: int, draws: int) -> ChatRequest:
    sampling = request.sampling
    if draw and sampling.temperature == 0:
        sampling = replace(sampling, temperature=REDRAWN_AT)
    return replace(request, sampling=sampling, sample=request.sample * draws + draw)


class ParsedAnswer(NamedTuple, Generic[T]):
    """The value read from an answer; None where none of the draws could be read, or the endpoint refused."""

    value: T | None
    completion: ChatCompletion  # The last one drawn


def require_one_read(answers: Sequence[ParsedAnswer[Any]], failure: str, example: str, remedy: str) -> None:
    """UserValueError that shows the last answer where there are answers and none could be read; `failure` is such as
    "the judge rated none of 3 features", `example` what was expected."""
    if not answers or any(answer.value is not None for answer in answers):
        return
    last = answers[-1].completion
    said = f"was refused: {last.refusal}" if last.refusal else f"was {last.text[:300]!r}"
    raise UserValueError(f"{failure} readably; expected answers such as {example}, the last {said}. {remedy}")


class ChatSession:
    """Asks one model. The same requests in the same order bring the same answers, without being sent twice."""

    def __init__(
        self,
        model: ChatModel,
        cache: CompletionCache,
        *,
        limits: Limits | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        """`sleep` is called for every pause, in place of a wait that Ctrl-C or another failure ends."""
        self.model = model
        self.cache = cache
        self.usage = Usage(limits or Limits())
        self._sleep = sleep
        self._counted: set[str] = set()

    def beside(self, model: ChatModel) -> ChatSession:
        """A session with another model that shares cache, budget and pace with this one."""
        other = copy.copy(self)
        other.model = model
        return other

    def complete(self, requests: Sequence[ChatRequest], description: str = "requests") -> list[ChatCompletion]:
        """One answer to each request, in order; equal requests share one.

        A request whose content the endpoint refuses has an empty answer with a `ChatCompletion.refusal`.

        Raises:
            RequestFailed: a request that cannot succeed, or failed too often; or the endpoint refused all requests sent
                in one way, and answered none. Requests in flight are waited for, and their answers are kept.
            BudgetSpent: the request or token budget ran out. Answers received so far are cached.
        """
        wanted = {request.key(self.model.identity): request for request in requests}
        pending = []
        for key, request in wanted.items():
            completion = self._known(request)
            if completion is None:
                pending.append(request)
            elif key not in self._counted:
                self._counted.add(key)
                self.usage.add(completion, cached=True)
        if pending:
            done = self._run(pending)
            for _ in progress(done, total=len(pending), description=description):
                pass
        self.cache.check({self._way(request) for request in wanted.values()})
        found = [self._known(request) for request in requests]
        return [completion for completion in found if completion is not None]

    def complete_parsed(
        self, requests: Sequence[ChatRequest], parse: Callable[[str], T], description: str = "requests", draws: int = 3
    ) -> list[ParsedAnswer[T]]:
        """As `complete`, and `parse` reads each answer; where it raises ValueError, a further draw is requested. A
        request that was refused is not sent again. The draws of request number s have the sample numbers s * draws .. s
        * draws + draws - 1, so that requests of different sample numbers never share one. What a greedy answer did not
        bring is drawn at temperature `REDRAWN_AT`: greedy once more, a model says the same again."""
        found: dict[int, ParsedAnswer[T]] = {}
        unread = list(range(len(requests)))
        for draw in range(draws):
            if not unread:
                break
            again = [_draw(requests[n], draw, draws) for n in unread]
            still = []
            for number, completion in zip(unread, self.complete(again, description), strict=True):
                found[number] = ParsedAnswer(None, completion)
                if completion.refusal:
                    continue
                try:
                    found[number] = ParsedAnswer(parse(completion.text), completion)
                except ValueError:
                    still.append(number)
            unread = still
        return [found[number] for number in sorted(found)]

    def _known(self, request: ChatRequest) -> ChatCompletion | None:
        """The answer to a request, or its refusal."""
        identity, route = self.model.identity, self.model.route
        return self.cache.get(request.key(identity)) or self.cache.get(request.refusal_key(identity, route))

    def _way(self, request: ChatRequest) -> str:
        return request.way(self.model.identity, self.model.route)

    def _run(self, pending: Sequence[ChatRequest]) -> Iterator[None]:
        """Send the requests, at most `concurrency` batches at a time; yield once for every answer or refusal."""
        size = self.model.batch_size
        stop = threading.Event()

        def ask(start: int) -> int:
            if stop.is_set():
                return 0
            try:
                return self._ask_batch(pending[start : start + size], stop)
            except BaseException:
                stop.set()  # here, so that no thread begins another batch
                raise

        with ThreadPoolExecutor(max_workers=self.model.concurrency) as pool:
            try:
                for done in as_completed([pool.submit(ask, start) for start in range(0, len(pending), size)]):
                    yield from [None] * done.result()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _ask_batch(self, batch: Sequence[ChatRequest], stop: threading.Event) -> int:
        """Ask until there is an outcome, `stop` is set, or the limits say to give up. Return the number of outcomes."""
        attempt, wait = 1, self._sleep or stop.wait
        while True:
            self.usage.reserve(len(batch), wait)
            if stop.is_set():
                return 0
            try:
                completions = self.model.complete(batch)
                break
            except RequestRefused as failure:
                if len(batch) == 1:
                    self._refuse(batch[0], failure)
                    return 1
                self.usage.fail(len(batch))  # each is then sent alone, which shows the one that was meant
                return sum(self._ask_batch([request], stop) for request in batch)
            except RequestFailed as failure:
                self.usage.fail(len(batch))
                pause = self.usage.limits.pause(attempt, failure)
                if pause is None or stop.is_set():
                    tries = f" after {attempt} attempts" if attempt > 1 else ""
                    raise RequestFailed(f"{failure}{tries}", retry=False) from failure
                if failure.retry_after is not None:
                    self.usage.hold(pause)  # the server asked for it, so all other requests wait too
                wait(pause)
                attempt += 1
        identity = self.model.identity
        for request, completion in zip(batch, completions, strict=True):
            key, way = request.key(identity), self._way(request)
            self.cache.put(key, identity, request, completion, way)
            self.usage.add(completion)
            self._counted.add(key)
        return len(batch)

    def _refuse(self, request: ChatRequest, failure: RequestRefused) -> None:
        identity = self.model.identity
        completion = ChatCompletion("", "refused", 0, 0, "", str(failure))
        self.usage.add(completion)
        self._counted.add(request.key(identity))
        key = request.refusal_key(identity, self.model.route)
        self.cache.put(key, identity, request, completion, self._way(request), content=failure.content)
