"""Errors that are a user's mistake: the command line prints them as one line; anything else keeps its traceback.

Each is also the built-in error that the Python API promises, so that `except ValueError` works.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType


class UserError(Exception):
    """Something that the user gave cannot work; the message says what came, what was expected and what to do."""


class UserValueError(UserError, ValueError):
    """A value, file content or combination of options that cannot work."""


class UserTypeError(UserError, TypeError):
    """An object of the wrong type."""


class UserOSError(UserError, OSError):
    """A place that cannot be read or written: rights, a full disk, a hub that does not answer."""


class UserFileNotFoundError(UserError, FileNotFoundError):
    """A file, folder, model or data set that is not there."""


class UserImportError(UserError, ImportError):
    """An optional library that is not installed."""


EXTRAS = {
    "report": ("matplotlib", "jinja2", "markdown_it"),
    "analysis": ("scipy", "sklearn"),
    "endpoint": ("openai",),
    "vllm": ("vllm",),
}
"""Libraries of the extras of this package, by the names under which they are imported."""


def require_extra(*extras: str) -> None:
    """Check that the libraries of one or several extras can be imported; commands do so before long work starts.
    UserImportError, which names the extra, if one is missing."""
    missing = {extra: [name for name in EXTRAS[extra] if not _importable(name)] for extra in extras}
    if any(missing.values()):
        raise UserImportError(
            f"this needs {', '.join(name for names in missing.values() for name in names)}, which cannot be imported; "
            f"run pip install 'qscope_posttrain[{','.join(extra for extra, names in missing.items() if names)}]'."
        )


def _importable(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


_BUGS = (AttributeError, NameError, AssertionError, RecursionError, StopIteration)
"""Never a library's way to refuse what it was given"""
_PLAIN = (ValueError, TypeError, OSError, ImportError, RuntimeError)
"""Errors whose message says enough without their name"""
_HERE = str(Path(__file__).parent)


@contextmanager
def library_refusals(what: str = "", kind: type[Exception] = Exception) -> Iterator[None]:
    """Turn what a library raises into a UserError, in a block that only hands over what the user gave (a model, say).

    Errors that this package raises itself stay as they are, and those of code that is in no library, such as a reward
    function of the user. Errors of the file system are the user's wherever they are raised. `what` comes before the
    library's words ("cannot load the model 'x'"); `kind` limits the errors, to OSError where results are written.
    """
    try:
        yield
    except UserError:
        raise
    except kind as error:
        if isinstance(error, _BUGS) or not (isinstance(error, OSError) or _in_library(error.__traceback__)):
            raise
        reason = str(error) if isinstance(error, _PLAIN) and str(error) else f"{type(error).__name__}: {error}"
        message = f"{what}: {reason}" if what else reason
        if isinstance(error, OSError):
            raise (UserFileNotFoundError if isinstance(error, FileNotFoundError) else UserOSError)(message) from error
        raise (UserTypeError if isinstance(error, TypeError) else UserValueError)(message) from error


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, and without the traceback that torch's data loaders put into it."""
    message = str(error)
    if message.startswith("Caught ") and "\nOriginal Traceback" in message:
        message = message.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(line.strip() for line in message.splitlines() if line.strip())


@contextmanager
def finite_probabilities() -> Iterator[None]:
    """Say in words why no token can be sampled in the block, for which torch has a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise UserValueError(
            "the model gives no probabilities: its weights or activations are not numbers (NaN)."
        ) from error


class CheckpointRefused(UserValueError):
    """A checkpoint is another run's or damaged: the same command does not go on from it."""


@contextmanager
def naming_what_is_kept(kept: Callable[[], str]) -> Iterator[None]:
    """Add to whatever ends the block early, Ctrl-C included, a sentence on what is kept of its work. `kept` gives it;
    the command line prints it. `CheckpointRefused` stays as it is: it says what to do."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, CheckpointRefused) and (words := kept()):
            error.add_note(words)
        raise


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A sentence that suggests the nearest name, or nothing."""
    close = difflib.get_close_matches(word, list(names), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def listed(names: Sequence[str]) -> str:
    """The first dozen of `names`, none of them too long."""
    more = len(names) - 12
    return ", ".join(name[:100] for name in names[:12]) + (f" and {more} more" if more > 0 else "")


def _in_library(traceback: TracebackType | None) -> bool:
    """Whether an error was raised by an installed package or the standard library, and not by this one."""
    place = ""
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if Path(name).is_absolute():  # not code that was made, such as the __init__ of a dataclass, or compiled
            place = name
        traceback = traceback.tb_next
    if place.startswith(_HERE):
        return False
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(place).parts) or place.startswith(
        sysconfig.get_path("stdlib")
    )
