"""Read text, JSON and JSON Lines (one object per line) that other programs wrote, and replace files in one step.

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark, with line ends of every system, and may be packed with gzip,
bzip2 or xz, recognized by its first bytes. Anything else is a ValueError that names the file, and the line if there is
one; a missing file is a FileNotFoundError.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import stat
import sys
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from qscope_posttrain.errors import UserError, UserFileNotFoundError, UserOSError, UserValueError

_BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Beginning -> encoding; the longer ones first, for one begins as another does. UTF-8 is the default."""
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open}
_COMPRESSED |= {b"BZh%d1AY&SY" % level: bz2.open for level in range(1, 10)}
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive (or an office document), not text: unpack it, or export it as text",
    b"(\xb5/\xfd": "compressed with zstd: unpack it first (zstd -d)",
    b"PAR1\x15": "a Parquet file, not text",
    b"ARROW1\0": "an Arrow file, not text",
    b"version https://git-lfs": "a pointer of Git LFS, not the file that it stands for: run git lfs pull",
    b"%PDF-": "a PDF, not text: export its text",
}
_SUFFIXES = (".gz", ".bz2", ".xz")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def text_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix that says what a text holds: `.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`."""
    place = Path(path)
    return Path(place.stem).suffix if place.suffix in _SUFFIXES else place.suffix


def check_is_file(path: str | os.PathLike[str], what: str = "file") -> Path:
    """Check that `path` is a regular file, and return it as a Path; `what` is the word for it in an error.
    FileNotFoundError for nothing, a folder, or a link that leads nowhere; ValueError for a pipe or a device."""
    place = Path(path)
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        leads = f"; it is a link to '{place.readlink()}', which does not exist" if place.is_symlink() else ""
        raise UserFileNotFoundError(f"no {what} at '{place}'{leads}.") from None
    except (OSError, ValueError) as error:  # a file where a folder should be, a name too long, a zero byte in it
        raise UserFileNotFoundError(f"no {what} at {str(place)!r} ({_reason(error)}).") from error
    if stat.S_ISDIR(mode):
        raise UserFileNotFoundError(f"no {what} at '{place}': it is a folder.")
    if not stat.S_ISREG(mode):
        raise UserValueError(f"'{place}' is a pipe or a device, which cannot be read twice: write it to a file first.")
    return place


def check_is_file_with_data(path: Path) -> int:
    """Size of the file in bytes. Errors for what is often found in place of the weights."""
    if not path.is_file():
        raise UserFileNotFoundError(f"no such file: {path}")
    size = path.stat().st_size
    if size == 0:
        raise UserValueError(f"{path} is empty (0 bytes): the download or copy failed, fetch it again")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UserValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
    return size


def check_plain(path: str | os.PathLike[str], what: str = "file", head: int | None = None, marked: bool = True) -> str:
    """Check that another library can read a file, UTF-8 throughout, and return its first line that is not blank, or "".
    With `head`, check only this number of lines, of a file that will be read as a stream, which must not be compressed.
    It may begin with a byte order mark if `marked`."""
    place = check_is_file(path, what)
    first = ""
    with _opened(place, packed=head is None) as stream:
        if stream.encoding != "utf-8":
            raise UserValueError(
                f"'{place}' is {stream.encoding.upper()}; this data must be UTF-8: "
                f"convert it with iconv -f {stream.encoding} -t utf-8."
            )
        for number, line in enumerate(islice(stream, head), start=1):
            plain = _checked(line, place, number)
            if line != plain and not marked:
                raise UserValueError(f"{place}, line {number}: a byte order mark; save the file as UTF-8 without one.")
            if len(line) - len(plain) > (number == 1):
                raise UserValueError(
                    f"{place}, line {number}: a second byte order mark; the file was put together from several. Take "
                    "the mark out (sed -i 's/\\xEF\\xBB\\xBF//g')."
                )
            first = first or plain.strip()
    return first


def read_lines(path: str | os.PathLike[str], what: str = "file", packed: bool = True) -> Iterator[str]:
    r"""Yield the lines of a text file, each ending in `\n` (except perhaps the last).

    Lines end as on Unix, Windows or old Macs: U+2028, at which `str.splitlines` also splits, may stand inside a JSON
    string. Byte order marks are left out, also where files were joined. `what` names the file in an error; `packed`
    tells whether it may be compressed.
    """
    place = check_is_file(path, what)
    with _opened(place, packed) as stream:
        for number, line in enumerate(stream, start=1):
            yield _checked(line, place, number)


def read_text(path: str | os.PathLike[str], what: str = "file") -> str:
    """Read a text file, which must not be compressed, as one string."""
    return "".join(read_lines(path, what, packed=False))


def read_csv(
    path: str | os.PathLike[str], what: str = "table", separator: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number (from 1, of the last line of a row) and the cells of every row that is not blank. With tabs
    between the cells there are no quotes, as in most published sets."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # csv has no limit by reader
    quoting: Any = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    rows = csv.reader(read_lines(path, what), delimiter=separator, quoting=quoting)
    try:
        for cells in rows:
            if cells:
                yield rows.line_num, cells
    except csv.Error as error:
        raise UserValueError(f"{path}, line {rows.line_num}: not CSV ({error}).") from error


@contextmanager
def _opened(place: Path, packed: bool) -> Iterator[io.TextIOWrapper]:
    r"""A stream of text with `\n` for every line end; bytes that are no UTF-8 are single surrogates in it."""
    try:
        with place.open("rb") as file:
            head = _head(file)
            unpack = next((opener for mark, opener in _COMPRESSED.items() if head.startswith(mark)), None)
            if unpack is not None and not packed:
                raise UserValueError(f"'{place}' is compressed, and is not read so: unpack it first (gunzip, xz -d).")
            content: IO[bytes] = file if unpack is None else unpack(file, "rb")
            with content:
                head = head if unpack is None else _head(content)
                other = next((words for mark, words in _NO_TEXT.items() if head.startswith(mark)), None)
                if other is not None:
                    raise UserValueError(f"'{place}' is {other}.")
                encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
                errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
                with io.TextIOWrapper(content, encoding=encoding, errors=errors, newline=None) as stream:
                    yield stream
    except UnicodeDecodeError as error:
        kind = f"not UTF-8 text, but {error.encoding.upper()} by its first bytes"
        raise UserValueError(f"'{place}' is {kind}, and damaged ({error.reason}).") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserValueError(f"'{place}' is compressed, and is cut off or damaged ({error}).") from error
    except OSError as error:
        raise UserValueError(f"'{place}' cannot be read ({_reason(error)}).") from error


def _head(file: IO[bytes]) -> bytes:
    head = file.read(24)
    file.seek(0)
    return head


def _checked(line: str, place: Path, number: int) -> str:
    line = line.lstrip("\ufeff")
    if "\0" in line:
        raise UserValueError(
            f"{place}, line {number}: a zero byte, which no text holds. The file is UTF-16 without a byte order mark "
            "(save it as UTF-8), or no text at all."
        )
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UserValueError(f"{place}, line {number}: {_fault(line[error.start :])}") from None
    return line


def _fault(rest: str) -> str:
    """The fault behind the surrogate that `rest` begins with: a byte that is no UTF-8, or half of a character."""
    code = ord(rest[0])
    with suppress(UnicodeError):  # three bytes that would be a character if it were a whole one
        code = ord(rest[:3].encode("utf-8", "surrogateescape").decode("utf-8", "surrogatepass"))
    if 0xDC80 <= code <= 0xDCFF:
        return f"not UTF-8 text (byte 0x{code - 0xDC00:02x}); save the file as UTF-8."
    return f"half of a surrogate pair (U+{code:04X}): the text is damaged."


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in an OSError of the block which file could not be written, and why."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserOSError(f"cannot write '{path}' ({error.strerror or error}).") from error
    except SafetensorError as error:  # also what is wrong with the tensors
        if "I/O error" not in str(error):
            raise
        raise UserOSError(f"cannot write '{path}' ({error}).") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; when the block ends, that file is flushed to disk and becomes `path`.
    When the block raises, the unfinished file is removed and `path` is as it was. FileNotFoundError where the folder
    does not exist; OSError, with the reason, where the file cannot be written."""
    if not path.parent.is_dir():
        raise UserFileNotFoundError(f"cannot write '{path}': the folder '{path.parent}' does not exist.")
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with writing(path):
            yield unfinished
            with unfinished.open("rb") as written:
                os.fsync(written.fileno())
            unfinished.replace(path)
    finally:
        with suppress(OSError):  # on a disk that can only be read any more
            unfinished.unlink(missing_ok=True)


def read_jsonl(path: str | os.PathLike[str], packed: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number (from 1) and the object of every line that is not blank; ValueError for anything else."""
    return parse_jsonl(read_lines(path, packed=packed), path)


def parse_jsonl(lines: Iterable[str], path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Do the same for lines that are read already; `path` stands for them in errors."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, parse_object(line, f"{path}, line {number}")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read the JSON value that a file holds. FileNotFoundError, or ValueError with the line."""
    return _parse("".join(read_lines(path)), str(path), by_line=True)


def parse_object(line: str, place: str, unique: bool = False) -> dict[str, Any]:
    """The JSON object that a line holds; ValueError, with its place, for anything else, nested too deeply, with half of
    a surrogate pair in a string, or with a key that must be `unique` and is not."""
    found = _parse(line, place, unique=unique)
    if not isinstance(found, dict):
        raise UserValueError(f"{place}: expected a JSON object, got {type(found).__name__}.")
    return found


def _parse(text: str, place: str, by_line: bool = False, unique: bool = False) -> Any:
    try:
        found = json.loads(text, object_pairs_hook=_unique if unique else None)
    except json.JSONDecodeError as error:
        where = f"{place}, line {error.lineno}" if by_line else place
        raise UserValueError(f"{where}: not JSON ({error.msg}).") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserValueError(f"{place}: not JSON that can be read ({reason}).") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(error.object[error.start]):04X}"
            raise UserValueError(f"{place}: half of a surrogate pair ({half}): the text is damaged.") from None
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserValueError(f"the key {next(n for n in names if names.count(n) > 1)[:100]!r} occurs twice")
    return values
