"""Keep answers and refusals on disk, by content."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qscope_posttrain.endpoint.chat import ChatCompletion, ChatRequest, RequestFailed
from qscope_posttrain.record_file import RecordFile

FIRST_FEW = 10
"""Number of requests sent in one way, all refused and not certainly for their content, that blame the way."""
Record = tuple[str, Mapping[str, Any], ChatRequest, ChatCompletion, str]  # Arguments of `CompletionCache.put`


class CompletionCache:
    """A `RecordFile` of answers that were paid for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`, or make it, with the errors of `RecordFile`."""
        self._lock = threading.Lock()
        self._known: dict[str, ChatCompletion] = {}
        self._ways: set[str] = set()
        self._file = RecordFile(path, "answer", "completion", self._read)
        self.path = self._file.path

    def __len__(self) -> int:
        return len(self._known)

    def __enter__(self) -> CompletionCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file to other processes."""
        self._file.close()

    def get(self, key: str) -> ChatCompletion | None:
        """The answer by `ChatRequest.key`, or the refusal by `ChatRequest.refusal_key`, if there is one."""
        return self._known.get(key)

    def has_answer(self, way: str) -> bool:
        """Whether any request that was sent in this way (`ChatRequest.way`) was answered."""
        return way in self._ways

    def put(
        self, key: str, identity: Mapping[str, Any], request: ChatRequest, completion: ChatCompletion, way: str = ""
    ) -> None:
        """Keep an answer or a refusal, on disk when this returns, with its request so that people can read the file."""
        record = {"key": key, "model": dict(identity), "request": asdict(request)}
        self._file.append(record | {"completion": asdict(completion), "way": way})
        with self._lock:
            self._keep(key, completion, way)

    def _read(self, record: dict[str, Any]) -> None:
        self._keep(record["key"], ChatCompletion(**record["completion"]), record.get("way", ""))

    def _keep(self, key: str, completion: ChatCompletion, way: str) -> None:
        self._known[key] = completion
        if way and not completion.refusal:
            self._ways.add(way)


class Refusals:
    """Refusals, kept on disk as soon as the endpoint has answered another request sent in the same way. Until then the
    reason may be the content or an option, and a refusal on disk would outlive the option. Thread-safe."""

    def __init__(self, cache: CompletionCache, *, ask_again: bool = False) -> None:
        """With `ask_again`, ignore refusals on disk."""
        self._cache, self._ask_again = cache, ask_again
        self._found: dict[str, ChatCompletion] = {}
        self._held: dict[str, list[tuple[Record, bool]]] = {}
        """Way -> refusals not on disk, and whether the content of each is the reason"""
        self._lock = threading.Lock()

    def get(self, key: str) -> ChatCompletion | None:
        """The refusal by `ChatRequest.refusal_key`, if there is one."""
        return self._found.get(key) or (None if self._ask_again else self._cache.get(key))

    def add(self, record: Record, content: bool) -> None:
        """Remember a refusal, and whether its content is known to be the reason. RequestFailed if the first few
        requests of this way were all refused, and not certainly for their content."""
        key, _, _, completion, way = record
        with self._lock:
            self._found[key] = completion
            if self._cache.has_answer(way):
                self._cache.put(*record)
                return
            held = self._held.setdefault(way, [])
            held.append((record, content))
            if sum(not known for _, known in held) >= FIRST_FEW:
                raise _all_refused(held)

    def answered(self, way: str) -> None:
        """Put the refusals of this way on disk: an answer has come, so their content was the reason."""
        with self._lock:
            for record, _ in self._held.pop(way, []):
                self._cache.put(*record)

    def check(self, ways: Iterable[str]) -> None:
        """Raise a RequestFailed where all requests sent in one of these ways were refused."""
        for way in ways:
            if held := self._held.get(way):
                raise _all_refused(held)


def _all_refused(held: Sequence[tuple[Record, bool]]) -> RequestFailed:
    (*_, last, _), content = held[-1]
    options = "--request-options, --max-tokens-name, --send-seed, temperature"
    advice = "" if content else f". If that is about an option ({options}), change it"
    return RequestFailed(
        f"the endpoint refused all of {len(held)} requests and has answered none like them: {last.refusal}"
        f"{advice}. These refusals are not kept: the next run asks again.",
        retry=False,
    )
