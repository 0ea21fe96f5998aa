"""Write a file in one step: a reader, or a crash, finds the old content or the new one and nothing between."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qscope_posttrain.errors import UserFileNotFoundError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; when the block ends well, that file is flushed to disk and becomes `path`.

    When the block raises, the unfinished file is removed and `path` is as it was.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise UserFileNotFoundError(f"Cannot write {path}: the folder {path.parent} does not exist.")
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield unfinished
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
