"""Errors that are a user's mistake, as opposed to a bug.

Each is also the built-in error that the Python API promises, so that `except ValueError` keeps working. The command
line prints them as one line; anything else keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something that the user gave cannot work; the message says what came, what was expected and what to do."""


class UserValueError(UserError, ValueError):
    """A value, file content or combination of options that cannot work."""


class UserTypeError(UserError, TypeError):
    """An object of the wrong type."""


class UserFileNotFoundError(UserError, FileNotFoundError):
    """A file, folder, model or data set that is not there."""
