"""Keep on disk what took long to get, one JSON object a line: answers of an endpoint, batches of samples."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from qscope_posttrain.errors import UserFileNotFoundError, UserOSError, UserValueError, naming_what_is_kept
from qscope_posttrain.files import check_is_file

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
Self = TypeVar("Self", bound="RecordFile")
Drawn = Sequence[tuple[list[int], bool]]  # The tokens of each response of a batch, and whether it ended by itself
_BEGINNING = b'{"key": "'  # Of every line


class RecordFile:
    """A file that is only appended to, safe against a crash at any byte. One process at a time; threads share it.

    A line is written whole and flushed to disk before its record counts. A process killed while it writes leaves a last
    line without its end, which the next one cuts off if it begins as a record does. Any other line that is no record is
    an error: the file is not ours, or was edited.
    """

    def __init__(
        self, path: str | os.PathLike[str], what: str, last: str, keep: Callable[[dict[str, Any]], None]
    ) -> None:
        """Open `path`, or make it, and call `keep` for each of its records. FileNotFoundError without its folder, or
        for a folder; ValueError if it is in use by another process, damaged, not one of our files, or a device.

        Args:
            what: The word for what a record holds, in an error.
            last: A key that a whole record has.
            keep: Raises ValueError, KeyError, TypeError or AttributeError for what is no record.
        """
        self.path, self._what, self._last = Path(path), what, last
        if not self.path.parent.is_dir():
            raise UserFileNotFoundError(f"cannot keep {what}s in '{self.path}': no folder '{self.path.parent}'.")
        if self.path.exists():
            check_is_file(self.path)
        self._lock = threading.Lock()
        try:
            self._file: BinaryIO = self.path.open("ab", buffering=0)
        except OSError as error:
            raise UserValueError(f"cannot keep {what}s in '{self.path}' ({error.strerror or error}).") from error
        try:
            _claim(self._file, self.path)
            self._read(keep)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file to other processes."""
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep a record, whose first key is `key`; it is on disk when this returns. OSError, and nothing of it in the
        file, where it cannot be written."""
        line = memoryview(json.dumps(record, ensure_ascii=True, allow_nan=False).encode() + b"\n")
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except OSError as error:
                self._file.truncate(end)
                reason = error.strerror or error
                raise UserOSError(
                    f"cannot keep {self._what}s in '{self.path}' ({reason}); those before are kept."
                ) from error

    def _read(self, keep: Callable[[dict[str, Any]], None]) -> None:
        end = 0
        with self.path.open("rb") as written:
            for number, line in enumerate(written, start=1):
                if not line.endswith(b"\n"):
                    self._check_fragment(line, number)
                    self._file.truncate(end)
                    os.fsync(self._file.fileno())
                    break
                try:
                    keep(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise UserValueError(
                        f"'{self.path}', line {number}, is no record of {_article(self._what)} ({error}); it was not "
                        "written here, or was changed. Move the file away, or take the line out."
                    ) from error
                end += len(line)

    def _check_fragment(self, line: bytes, number: int) -> None:
        """ValueError for a last line without an end that cannot be the beginning of a record, cut off."""
        if _BEGINNING.startswith(line[: len(_BEGINNING)]):
            try:
                found = json.loads(line)
            except ValueError:
                return
            if self._last in found:  # whole but for its line end
                return
        raise UserValueError(
            f"'{self.path}', line {number}, has no line end and does not begin as a record of {_article(self._what)} "
            f"does ({line[:40]!r}); the file was not written here, and nothing of it is changed. Name another file for "
            f"the {self._what}s."
        )


def draw_and_keep(
    path: str | os.PathLike[str],
    model: nn.Module,
    asked: Any,
    batches: Sequence[T],
    draw: Callable[[T], Drawn],
) -> Iterator[Drawn]:
    """Yield `draw(batch)` for each batch, and keep it in a file, from which the same call goes on as if it had not been
    interrupted: beside the responses stands the state of the random numbers after them. `asked` is JSON of all that
    the responses depend on, beside the weights of the model. ValueError while the model is steered."""
    import torch

    from qscope_posttrain.provenance import package_versions, weights_fingerprint

    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    if any(getattr(hook, "__module__", None) == "qscope_posttrain.models.steering" for hook in hooks):
        raise UserValueError("samples of a steered model cannot be kept (keep=): they would be taken for others.")
    device = next(model.parameters()).device
    sources: list[tuple[Any, tuple[Any, ...]]] = [(torch, ())]
    if device.type != "cpu":  # that of CUDA which the model is on need not be the current one
        sources.append((torch.get_device_module(device), (device,) if device.type == "cuda" else ()))
    content = json.dumps([asked, weights_fingerprint(model), device.type, package_versions()], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()
    kept: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        if record["key"] == key and record["batch"] == len(kept):
            kept.append(record)

    def words() -> str:
        return f"{len(kept)} of {len(batches)} batches are kept in '{path}': the same command goes on from there."

    with RecordFile(path, "sample", "state", keep) as file, naming_what_is_kept(words):
        for record in kept:
            yield [(tokens, ended) for tokens, ended in record["responses"]]
        for (source, place), text in zip(sources, kept[-1]["state"] if kept else (), strict=False):
            source.set_rng_state(torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8), *place)
        for number in range(len(kept), len(batches)):
            drawn = draw(batches[number])
            states = [bytes(source.get_rng_state(*place).tolist()) for source, place in sources]
            record = {"key": key, "batch": number, "responses": [list(one) for one in drawn]}
            file.append(record | {"state": [base64.b64encode(state).decode() for state in states]})
            kept.append(record)
            yield drawn


def _article(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


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
