"""Write a file in one step: a reader, or a crash, finds the old content or the new one and nothing between."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qscope_posttrain.errors import UserFileNotFoundError, UserOSError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; when the block ends well, that file is flushed to disk and becomes `path`.

    When the block raises, the unfinished file is removed and `path` is as it was.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be written, with the reason.
    """
    if not path.parent.is_dir():
        raise UserFileNotFoundError(f"cannot write '{path}': the folder '{path.parent}' does not exist.")
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield unfinished
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise UserOSError(f"cannot write '{path}' ({error.strerror or error}).") from error
    except SafetensorError as error:  # also what is wrong with the tensors
        if "I/O error" not in str(error):
            raise
        raise UserOSError(f"cannot write '{path}' ({error}).") from error
    finally:
        unfinished.unlink(missing_ok=True)
