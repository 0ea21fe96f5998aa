"""Answers on disk, by content: one JSONL file that is only ever appended to, safe against a crash at any byte."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from qscope_posttrain.endpoint.chat import ChatRequest, Completion
from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.files import check_is_file

_RECORD = b'{"key": "'
"""How every line begins."""


class CompletionCache:
    """A file of answers that were paid for. One process at a time; threads share it.

    A line is written whole and flushed to disk before its answer is used. A process killed while it writes leaves a
    last line without its end, which the next one cuts off if it begins as a record does. Anything else that is not a
    record is an error: then the file is not ours, or was edited.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`, or make it; its folder must exist.

        Raises:
            FileNotFoundError: no such folder, or a folder at `path`.
            ValueError: another process holds it, a line is damaged, or the file is not one of ours, or a device.
        """
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise UserFileNotFoundError(
                f"cannot keep answers in '{self.path}': there is no folder '{self.path.parent}'."
            )
        if self.path.exists():
            check_is_file(self.path)
        self._lock = threading.Lock()
        self._known: dict[str, Completion] = {}
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
        """Give the file up to other processes."""
        self._file.close()

    def get(self, key: str) -> Completion | None:
        """The answer known by `ChatRequest.key`, or the refusal by `ChatRequest.refusal_key`, if there is one."""
        return self._known.get(key)

    def has_answer(self, way: str) -> bool:
        """Whether any request that was sent in this way (`ChatRequest.way`) was answered."""
        return way in self._ways

    def put(
        self, key: str, identity: Mapping[str, Any], request: ChatRequest, completion: Completion, way: str = ""
    ) -> None:
        """Keep an answer or a refusal, on disk when this returns. Without its request nobody could read the file."""
        record = {
            "key": key,
            "model": dict(identity),
            "request": request.to_dict(),
            "completion": asdict(completion),
            "way": way,
        }
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
                self._keep(record["key"], Completion(**record["completion"]), record.get("way", ""))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserValueError(
                    f"'{self.path}', line {number}, is no record of an answer ({error}); it was not written here, or "
                    "was changed. Move the file away, or take the line out."
                ) from error
            end += len(line)
        self._file.seek(0, os.SEEK_END)

    def _keep(self, key: str, completion: Completion, way: str) -> None:
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
