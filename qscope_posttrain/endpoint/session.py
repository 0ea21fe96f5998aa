"""A session with a chat model: cached, retried, paced, within a budget, several requests at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, NamedTuple, TypeVar

from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatModel, ChatRequest, Completion
from qscope_posttrain.endpoint.failures import RequestFailed, RetryPolicy
from qscope_posttrain.endpoint.limits import Limits, Pace, Usage
from qscope_posttrain.report.progress import progress

T = TypeVar("T")


class Answer(NamedTuple, Generic[T]):
    """What was read out of an answer; None where none of the draws could be read."""

    value: T | None
    completion: Completion
    """The last one drawn"""


class ChatSession:
    """Asks one model. The same requests in the same order bring the same answers, without asking twice."""

    def __init__(
        self,
        model: ChatModel,
        cache: CompletionCache,
        *,
        limits: Limits | None = None,
        retry: RetryPolicy | None = None,
        show_progress: bool | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`sleep` is called for every pause."""
        self.model = model
        self.cache = cache
        self.retry = retry or RetryPolicy()
        self.usage = Usage(limits or Limits())
        self._identity = dict(model.identity)
        self._pace = Pace(self.usage.limits.requests_per_minute, sleep)
        self._show_progress = show_progress
        self._sleep = sleep
        self._counted: set[str] = set()

    def beside(self, model: ChatModel) -> ChatSession:
        """A session with another model that shares cache, budget and pace with this one."""
        other = ChatSession(model, self.cache, retry=self.retry, show_progress=self._show_progress, sleep=self._sleep)
        other.usage, other._pace, other._counted = self.usage, self._pace, self._counted
        return other

    def complete(self, requests: Sequence[ChatRequest], description: str = "requests") -> list[Completion]:
        """One answer to each request, in order; equal requests share one.

        Raises:
            RequestFailed: a request that cannot succeed, or failed too often. Those already sent are waited for, and
                their answers are kept.
            BudgetSpent: the same, for the want of budget.
        """
        keys = [request.key(self._identity) for request in requests]
        wanted = dict(zip(keys, requests, strict=True))
        for key in wanted:
            if self.cache.get(key) is not None and key not in self._counted:
                self._count_cached(key)
        pending = [(key, request) for key, request in wanted.items() if self.cache.get(key) is None]
        if pending:
            self._ask(pending, description)
        found = [self.cache.get(key) for key in keys]
        return [completion for completion in found if completion is not None]

    def complete_parsed(
        self,
        requests: Sequence[ChatRequest],
        parse: Callable[[str], T],
        description: str = "requests",
        draws: int = 3,
    ) -> list[Answer[T]]:
        """As `complete`, and `parse` reads each answer; where it raises ValueError, a further draw is asked for.

        The draws of request number s have the sample numbers s * draws .. s * draws + draws - 1, so that requests of
        different sample numbers never share one.
        """
        values: list[T | None] = [None] * len(requests)
        last: list[Completion | None] = [None] * len(requests)
        open_ones = list(range(len(requests)))
        for draw in range(draws):
            if not open_ones:
                break
            again = [_numbered(requests[index], requests[index].sample * draws + draw) for index in open_ones]
            unread = []
            for index, completion in zip(open_ones, self.complete(again, description), strict=True):
                last[index] = completion
                try:
                    values[index] = parse(completion.text)
                except ValueError:
                    unread.append(index)
            open_ones = unread
        return [
            Answer(value, completion) for value, completion in zip(values, last, strict=True) if completion is not None
        ]

    def _count_cached(self, key: str) -> None:
        completion = self.cache.get(key)
        if completion is not None:
            self.usage.reserve(cached=True)
            self.usage.add(completion.prompt_tokens, completion.completion_tokens)
            self._counted.add(key)

    def _ask(self, pending: Sequence[tuple[str, ChatRequest]], description: str) -> None:
        size = self.model.batch_size
        batches = [pending[start : start + size] for start in range(0, len(pending), size)]
        done = self._run(batches)
        for _ in progress(done, total=len(pending), description=description, enabled=self._show_progress):
            pass

    def _run(self, batches: Sequence[Sequence[tuple[str, ChatRequest]]]) -> Iterator[None]:
        """Yields once for every answer kept; at most `concurrency` batches are under way."""
        waiting = iter(batches)
        under_way: set[Future[int]] = set()
        failure: BaseException | None = None
        stop = threading.Event()
        with ThreadPoolExecutor(max_workers=self.model.concurrency) as pool:
            try:
                while True:
                    while failure is None and len(under_way) < self.model.concurrency:
                        batch = next(waiting, None)
                        if batch is None:
                            break
                        under_way.add(pool.submit(self._ask_batch, batch, stop))
                    if not under_way:
                        break
                    finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
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

    def _ask_batch(self, batch: Sequence[tuple[str, ChatRequest]], stop: threading.Event) -> int:
        """Ask until there is an answer, `stop` is set, or the policy gives up. Returns how many answers were kept."""
        attempt = 1
        while True:
            self._pace.wait()
            self.usage.reserve(len(batch))
            try:
                completions = self.model.complete([request for _, request in batch])
                break
            except RequestFailed as failure:
                self.usage.fail(len(batch))
                pause = self.retry.wait(attempt, failure)
                if pause is None or stop.is_set():
                    tries = f" after {attempt} attempts" if attempt > 1 else ""
                    raise RequestFailed(f"{failure}{tries}", retry=False) from failure
                if failure.retry_after is not None:
                    self._pace.hold(pause)  # the server asked, so nobody else need try
                self._sleep(pause)
                attempt += 1
        for (key, request), completion in zip(batch, completions, strict=True):
            self.cache.put(key, self._identity, request, completion)
            self.usage.add(completion.prompt_tokens, completion.completion_tokens)
            self._counted.add(key)
        return len(batch)


def _numbered(request: ChatRequest, sample: int) -> ChatRequest:
    return ChatRequest(request.messages, request.sampling, sample)
