"""Keep answers and refusals on disk, by content: one JSONL file, only appended to, safe against a crash at any byte."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from qscope_posttrain.endpoint.chat import ChatCompletion, ChatRequest, RequestFailed
from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.files import check_is_file

FIRST_FEW = 10
"""Number of requests sent in one way, all refused and not certainly for their content, that blame the way."""
_RECORD = b'{"key": "'  # Beginning of every line
Record = tuple[str, Mapping[str, Any], ChatRequest, ChatCompletion, str]  # Arguments of `CompletionCache.put`


class CompletionCache:
    """A file of answers that were paid for. One process at a time; threads share it.

    A line is written whole and flushed to disk before its answer is used. A process killed while it writes leaves a
    last line without its end, which the next one cuts off if it begins as a record does. Any other line that is no
    record is an error: the file is not ours, or was edited.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`, or make it. FileNotFoundError without its folder, or for a folder; ValueError if it is in use by
        another process, damaged, not one of our files, or a device."""
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise UserFileNotFoundError(f"cannot keep answers in '{self.path}': no folder '{self.path.parent}'.")
        if self.path.exists():
            check_is_file(self.path)
        self._lock = threading.Lock()
        self._known: dict[str, ChatCompletion] = {}
        self._ways: set[str] = set()
        try:
            self._file: BinaryIO = self.path.open("a+b")
        except OSError as error:
            raise UserValueError(f"cannot keep answers in '{self.path}' ({error.strerror or error}).") from error
        try:
            _claim(self._file, self.path)
            self._read()
        except BaseException:
            self._file.close()
            raise

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
        record |= {"completion": asdict(completion), "way": way}
        line = json.dumps(record, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._keep(key, completion, way)

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._check_fragment(line, number)
                self._file.truncate(end)
                os.fsync(self._file.fileno())
                break
            try:
                record = json.loads(line)
                self._keep(record["key"], ChatCompletion(**record["completion"]), record.get("way", ""))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserValueError(
                    f"'{self.path}', line {number}, is no record of an answer ({error}); it was not written here, or "
                    "was changed. Move the file away, or take the line out."
                ) from error
            end += len(line)
        self._file.seek(0, os.SEEK_END)

    def _keep(self, key: str, completion: ChatCompletion, way: str) -> None:
        self._known[key] = completion
        if way and not completion.refusal:
            self._ways.add(way)

    def _check_fragment(self, line: bytes, number: int) -> None:
        """ValueError for a last line without an end that cannot be the beginning of a record, cut off."""
        if _RECORD.startswith(line[: len(_RECORD)]):
            try:
                found = json.loads(line)
            except ValueError:
                return
            if "completion" in found:  # whole but for its line end
                return
        raise UserValueError(
            f"'{self.path}', line {number}, has no line end and does not begin as a record of an answer does "
            f"({line[:40]!r}); the file was not written here, and nothing of it is changed. Name another file for the "
            "answers."
        )


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


def _claim(file: BinaryIO, path: Path) -> None:
    """Lock the file until it is closed or the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock; two processes would only ask twice
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserValueError(f"'{path}' is in use by another process; wait for it, or choose another file.") from error
