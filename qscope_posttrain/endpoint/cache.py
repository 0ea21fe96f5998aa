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


class CompletionCache(RecordFile):
    """A file of answers that were paid for, and of refusals.

    A refusal is on disk as soon as the endpoint has answered another request sent in the same way (`ChatRequest.way`).
    Until then the reason may be the content or an option, and a refusal on disk would outlive the option.
    """

    def __init__(self, path: str | os.PathLike[str], *, ask_refused_again: bool = False) -> None:
        """Open `path`, or make it, with the errors of `RecordFile`. `ask_refused_again` ignores refusals in it."""
        self._known: dict[str, ChatCompletion] = {}  # What is on disk
        self._refused: dict[str, ChatCompletion] = {}  # Refusals since the file was opened
        self._held: dict[str, list[tuple[dict[str, Any], bool]]] = {}
        """Way -> refusals not on disk, and whether the content of each is the reason"""
        self._ways: set[str] = set()  # Those in which a request was sent that was answered
        self._ask_refused_again = ask_refused_again
        self._state = threading.Lock()
        super().__init__(path, "answer", "completion", self._keep)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> ChatCompletion | None:
        """The answer by `ChatRequest.key`, or the refusal by `ChatRequest.refusal_key`, if there is one."""
        found = self._known.get(key)
        return self._refused.get(key) if found is None or (found.refusal and self._ask_refused_again) else found

    def put(
        self,
        key: str,
        identity: Mapping[str, Any],
        request: ChatRequest,
        completion: ChatCompletion,
        way: str = "",
        *,
        content: bool = True,
    ) -> None:
        """Keep an answer, on disk when this returns, with its request so that people can read the file; or a refusal,
        with `content` where that is known to be the reason. RequestFailed if the first few requests of this way were
        all refused, and not certainly for their content."""
        record = {"key": key, "model": dict(identity), "request": asdict(request)}
        record |= {"completion": asdict(completion), "way": way}
        with self._state:
            if completion.refusal:
                self._refused[key] = completion
            if completion.refusal and way not in self._ways:
                held = self._held.setdefault(way, [])
                held.append((record, content))
                if sum(not known for _, known in held) >= FIRST_FEW:
                    raise _all_refused(held)
                return
            self._write(record)
            for refusal, _ in self._held.pop(way, []):  # an answer has come, so their content was the reason
                self._write(refusal)

    def check(self, ways: Iterable[str]) -> None:
        """Raise a RequestFailed where all requests sent in one of these ways were refused."""
        for way in ways:
            if held := self._held.get(way):
                raise _all_refused(held)

    def _write(self, record: dict[str, Any]) -> None:
        self.append(record)
        self._keep(record)

    def _keep(self, record: dict[str, Any]) -> None:
        completion, way = ChatCompletion(**record["completion"]), record.get("way", "")
        self._known[record["key"]] = completion
        if way and not completion.refusal:
            self._ways.add(way)


def _all_refused(held: Sequence[tuple[dict[str, Any], bool]]) -> RequestFailed:
    last, content = held[-1]
    options = "--request-options, --max-tokens-name, --send-seed, temperature"
    advice = "" if content else f". If that is about an option ({options}), change it"
    return RequestFailed(
        f"the endpoint refused all of {len(held)} requests and has answered none like them: "
        f"{last['completion']['refusal']}{advice}. These refusals are not kept: the next run asks again.",
        retry=False,
    )
