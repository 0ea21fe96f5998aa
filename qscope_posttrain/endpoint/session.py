"""Ask a chat model with a cache, retries, a rate limit and a budget, several requests at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

from qscope_posttrain.endpoint.cache import CompletionCache, Refusals
from qscope_posttrain.endpoint.chat import ChatCompletion, ChatModel, ChatRequest, RequestFailed, RequestRefused
from qscope_posttrain.endpoint.limits import Limits, Pace, RetryPolicy, Usage
from qscope_posttrain.report.progress import progress

T = TypeVar("T")
Batch = Sequence[tuple[str, ChatRequest]]
"""Requests with their keys in the cache"""


class ParsedAnswer(NamedTuple, Generic[T]):
    """The value read from an answer; None where none of the draws could be read, or the endpoint refused."""

    value: T | None
    completion: ChatCompletion
    """The last one drawn"""


class ChatSession:
    """Asks one model. The same requests in the same order bring the same answers, without being sent twice."""

    def __init__(
        self,
        model: ChatModel,
        cache: CompletionCache,
        *,
        limits: Limits | None = None,
        retry: RetryPolicy | None = None,
        show_progress: bool | None = None,
        sleep: Callable[[float], None] = time.sleep,
        ask_refused_again: bool = False,
    ) -> None:
        """`sleep` is called for every pause. `ask_refused_again` sends the requests that an earlier run saw refused."""
        self.model = model
        self.cache = cache
        self.retry = retry or RetryPolicy()
        self.usage = Usage(limits or Limits())
        self._identity, self._route = dict(model.identity), dict(model.route)
        self._refusals = Refusals(cache, ask_again=ask_refused_again)
        self._pace = Pace(self.usage.limits.requests_per_minute, sleep)
        self._show_progress = show_progress
        self._sleep = sleep
        self._counted: set[str] = set()

    def beside(self, model: ChatModel) -> ChatSession:
        """A session with another model that shares cache, budget and pace with this one."""
        other = ChatSession(model, self.cache, retry=self.retry, show_progress=self._show_progress, sleep=self._sleep)
        other.usage, other._pace, other._counted = self.usage, self._pace, self._counted
        other._refusals = self._refusals
        return other

    def complete(self, requests: Sequence[ChatRequest], description: str = "requests") -> list[ChatCompletion]:
        """One answer to each request, in order; equal requests share one.

        A request whose content the endpoint refuses has an empty answer with a `ChatCompletion.refusal`.

        Raises:
            RequestFailed: a request that cannot succeed, or failed too often; or the endpoint refused all requests sent
                in one way, and answered none. Requests in flight are waited for, and their answers are kept.
            BudgetSpent: the request or token budget ran out. Answers received so far are cached.
        """
        keys = [request.key(self._identity) for request in requests]
        wanted = dict(zip(keys, requests, strict=True))
        pending = []
        for key, request in wanted.items():
            completion = self._known(key, request)
            if completion is None:
                pending.append((key, request))
            elif key not in self._counted:
                self._counted.add(key)
                self.usage.add(completion.prompt_tokens, completion.completion_tokens, cached=True)
                if completion.refusal:
                    self.usage.refuse(completion.refusal)
        if pending:
            done = self._run(pending)
            for _ in progress(done, total=len(pending), description=description, enabled=self._show_progress):
                pass
        self._refusals.check({self._way(request) for request in wanted.values()})
        found = [self._known(key, request) for key, request in zip(keys, requests, strict=True)]
        return [completion for completion in found if completion is not None]

    def complete_parsed(
        self,
        requests: Sequence[ChatRequest],
        parse: Callable[[str], T],
        description: str = "requests",
        draws: int = 3,
    ) -> list[ParsedAnswer[T]]:
        """As `complete`, and `parse` reads each answer; where it raises ValueError, a further draw is requested. A
        request that was refused is not sent again.

        The draws of request number s have the sample numbers s * draws .. s * draws + draws - 1, so that requests of
        different sample numbers never share one.
        """
        found: dict[int, ParsedAnswer[T]] = {}
        unread = list(range(len(requests)))
        for draw in range(draws):
            if not unread:
                break
            again = [replace(requests[n], sample=requests[n].sample * draws + draw) for n in unread]
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

    def _known(self, key: str, request: ChatRequest) -> ChatCompletion | None:
        """The answer to a request, or its refusal."""
        answer = self.cache.get(key)
        return answer or self._refusals.get(request.refusal_key(self._identity, self._route))

    def _way(self, request: ChatRequest) -> str:
        return request.way(self._identity, self._route)

    def _run(self, pending: Batch) -> Iterator[None]:
        """Send the requests, at most `concurrency` batches at a time; yield once for every answer or refusal."""
        size = self.model.batch_size
        waiting = iter([pending[start : start + size] for start in range(0, len(pending), size)])
        in_flight: set[Future[int]] = set()
        failure: BaseException | None = None
        stop = threading.Event()
        with ThreadPoolExecutor(max_workers=self.model.concurrency) as pool:
            try:
                while True:
                    while failure is None and len(in_flight) < self.model.concurrency:
                        batch = next(waiting, None)
                        if batch is None:
                            break
                        in_flight.add(pool.submit(self._ask_batch, batch, stop))
                    if not in_flight:
                        break
                    finished, in_flight = wait(in_flight, return_when=FIRST_COMPLETED)
                    for future in finished:
                        error = future.exception()
                        if error is not None:
                            failure = failure or error
                            stop.set()
                        else:
                            yield from [None] * future.result()
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        if failure is not None:
            raise failure

    def _ask_batch(self, batch: Batch, stop: threading.Event) -> int:
        """Ask until there is an outcome, `stop` is set, or the policy gives up. Return the number of outcomes."""
        attempt = 1
        while True:
            self._pace.wait()
            self.usage.reserve(len(batch))
            try:
                completions = self.model.complete([request for _, request in batch])
                break
            except RequestRefused as failure:
                if len(batch) == 1:
                    self._refuse(*batch[0], failure)
                    return 1
                self.usage.fail(len(batch))  # each is then sent alone, which shows the one that was meant
                return sum(self._ask_batch([entry], stop) for entry in batch)
            except RequestFailed as failure:
                self.usage.fail(len(batch))
                pause = self.retry.wait(attempt, failure)
                if pause is None or stop.is_set():
                    tries = f" after {attempt} attempts" if attempt > 1 else ""
                    raise RequestFailed(f"{failure}{tries}", retry=False) from failure
                if failure.retry_after is not None:
                    self._pace.hold(pause)  # the server asked for it, so all other requests wait too
                self._sleep(pause)
                attempt += 1
        for (key, request), completion in zip(batch, completions, strict=True):
            way = self._way(request)
            self.cache.put(key, self._identity, request, completion, way)
            self._refusals.answered(way)
            self.usage.add(completion.prompt_tokens, completion.completion_tokens)
            self._counted.add(key)
        return len(batch)

    def _refuse(self, key: str, request: ChatRequest, failure: RequestRefused) -> None:
        self.usage.refuse(str(failure))
        self._counted.add(key)
        refusal_key = request.refusal_key(self._identity, self._route)
        self._refusals.add(refusal_key, self._identity, request, self._way(request), failure)
