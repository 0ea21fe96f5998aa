"""A session with a chat model: cached, retried, paced, within a budget, several requests at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, NamedTuple, TypeVar

from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatModel, ChatRequest, Completion
from qscope_posttrain.endpoint.failures import Refusals, RequestFailed, RequestRefused, RetryPolicy
from qscope_posttrain.endpoint.limits import Limits, Pace, Usage
from qscope_posttrain.report.progress import progress

T = TypeVar("T")


class Answer(NamedTuple, Generic[T]):
    """What was read out of an answer; None where none of the draws could be read, or the endpoint refused."""

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
        ask_refused_again: bool = False,
    ) -> None:
        """`sleep` is called for every pause. `ask_refused_again` sends what an earlier session saw refused."""
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

    def complete(self, requests: Sequence[ChatRequest], description: str = "requests") -> list[Completion]:
        """One answer to each request, in order; equal requests share one.

        A request that the endpoint refuses for its words has an empty one, which says so (`Completion.refusal`).

        Raises:
            RequestFailed: a request that cannot succeed, or failed too often; or the endpoint refused all requests of
                one way, and answered none. Those already sent are waited for, and their answers are kept.
            BudgetSpent: the same, for the want of budget.
        """
        keys = [request.key(self._identity) for request in requests]
        wanted = dict(zip(keys, requests, strict=True))
        known = {key: self._known(key, request) for key, request in wanted.items()}
        for key, completion in known.items():
            if completion is not None and key not in self._counted:
                self._count_cached(key, completion)
        pending = [(key, request) for key, request in wanted.items() if known[key] is None]
        if pending:
            self._ask(pending, description)
        self._refusals.check({self._way(request) for request in wanted.values()})
        found = [self._known(key, request) for key, request in zip(keys, requests, strict=True)]
        return [completion for completion in found if completion is not None]

    def complete_parsed(
        self,
        requests: Sequence[ChatRequest],
        parse: Callable[[str], T],
        description: str = "requests",
        draws: int = 3,
    ) -> list[Answer[T]]:
        """As `complete`, and `parse` reads each answer; where it raises ValueError, a further draw is asked for. A
        request that was refused is not asked again.

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
                if completion.refusal:
                    continue
                try:
                    values[index] = parse(completion.text)
                except ValueError:
                    unread.append(index)
            open_ones = unread
        return [
            Answer(value, completion) for value, completion in zip(values, last, strict=True) if completion is not None
        ]

    def _known(self, key: str, request: ChatRequest) -> Completion | None:
        """The answer to a request, or its refusal."""
        answer = self.cache.get(key)
        return answer or self._refusals.get(request.refusal_key(self._identity, self._route))

    def _way(self, request: ChatRequest) -> str:
        return request.way(self._identity, self._route)

    def _count_cached(self, key: str, completion: Completion) -> None:
        self.usage.take(completion.prompt_tokens, completion.completion_tokens)
        if completion.refusal:
            self.usage.refuse(completion.refusal)
        self._counted.add(key)

    def _ask(self, pending: Sequence[tuple[str, ChatRequest]], description: str) -> None:
        size = self.model.batch_size
        batches = [pending[start : start + size] for start in range(0, len(pending), size)]
        done = self._run(batches)
        for _ in progress(done, total=len(pending), description=description, enabled=self._show_progress):
            pass

    def _run(self, batches: Sequence[Sequence[tuple[str, ChatRequest]]]) -> Iterator[None]:
        """Yields once for every answer or refusal; at most `concurrency` batches are under way."""
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
        """Ask until there is an outcome, `stop` is set, or the policy gives up. Returns how many outcomes there are."""
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
                self.usage.fail(len(batch))  # which of them is meant shows when each is asked alone
                return sum(self._ask_batch([entry], stop) for entry in batch)
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


def _numbered(request: ChatRequest, sample: int) -> ChatRequest:
    return ChatRequest(request.messages, request.sampling, sample)
