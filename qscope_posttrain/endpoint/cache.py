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


class CompletionCache:
    """A file of answers that were paid for. One process at a time; threads share it.

    A line is written whole and flushed to disk before its answer is used. A process killed while it writes leaves a
    last line without its end, which the next one cuts off. Anything else that is not a record is an error: then the
    file is not ours, or was edited.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`, or make it; its folder must exist.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: another process holds it, or a line is damaged.
        """
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"cannot keep answers in '{self.path}': there is no folder '{self.path.parent}'.")
        self._lock = threading.Lock()
        self._file: BinaryIO = self.path.open("a+b")
        try:
            _claim(self._file, self.path)
            self._known = self._read()
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
        """The answer known by `ChatRequest.key`, if there is one."""
        return self._known.get(key)

    def put(self, key: str, identity: Mapping[str, Any], request: ChatRequest, completion: Completion) -> None:
        """Keep an answer, on disk when this returns. Without its request nobody could read the file."""
        record = {"key": key, "model": dict(identity), "request": request.to_dict(), "completion": asdict(completion)}
        line = json.dumps(record, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._known[key] = completion

    def _read(self) -> dict[str, Completion]:
        self._file.seek(0)
        known: dict[str, Completion] = {}
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(end)
                os.fsync(self._file.fileno())
                break
            try:
                record = json.loads(line)
                known[record["key"]] = Completion(**record["completion"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"'{self.path}', line {number}, is no record of an answer ({error}); it was not written here, or "
                    "was changed. Move the file away, or take the line out."
                ) from error
            end += len(line)
        self._file.seek(0, os.SEEK_END)
        return known


def _claim(file: BinaryIO, path: Path) -> None:
    """Lock the file until it is closed or the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock; two processes would only ask twice
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"'{path}' is in use by another process; wait for it, or choose another file.") from error
