"""Check and convert a value of a recipe as the command line would: type, choices, one value or several."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args, get_origin

from qscope_posttrain.errors import UserValueError, did_you_mean
from qscope_posttrain.recipe_file import as_text

_WORDS: dict[Any, str] = {bool: "a truth value", int: "a whole number", float: "a number", str: "text"}


def checked(value: Any, written: Any, action: argparse.Action, kinds: Collection[Any], place: str) -> Any:
    """The value for this option; null where the option may be left without one.

    Args:
        written: The value as the file writes it, for options that take text: 7, 007 and no are text there.
        kinds: The types that it may have, from `kinds_of` or `kinds_of_option`.
        place: File and key, for messages.

    Raises:
        ValueError: another type, another number of values, or none of the choices.
    """
    if value is None:
        if type(None) in kinds or action.default is None:
            return None
        raise UserValueError(f"{place} must be {_wanted(kinds)}; got null. Leave the key out for its default.")
    if not isinstance(value, list):
        value = _item(value, written, action, kinds, place)
        if action.nargs not in ("+", "*") and not (isinstance(action.nargs, int) and action.nargs):
            return value
        value = [value]
    elif list not in kinds:
        raise UserValueError(f"{place} must be a single value; got {value!r}.")
    else:
        if not isinstance(written, list) or len(written) != len(value):  # it comes from an alias, which is not followed
            written = as_text(value)
        value = [_item(item, text, action, kinds, place) for item, text in zip(value, written, strict=True)]
    if isinstance(action.nargs, int) and action.nargs and len(value) != action.nargs:
        raise UserValueError(f"{place} must be a list of {action.nargs} values; got {value!r}.")
    return value


def kinds_of(hint: Any) -> set[Any]:
    """The plain types that a declared type admits, at any depth; `list` or `dict` among them where it admits one."""
    origin = get_origin(hint)
    if origin is Literal:
        return {type(value) for value in get_args(hint)}
    if origin is dict:
        return {dict}
    if origin is None:
        return {hint}
    inner = set().union(*(kinds_of(argument) for argument in get_args(hint)))
    return inner | {list} if origin is list else inner


def kinds_of_option(action: argparse.Action) -> set[Any]:
    """The same from an option alone."""
    if action.nargs == 0:
        return {bool}
    kind = action.type if action.type in (int, float) else str
    return {kind} if action.nargs is None else {kind, list}


def _item(value: Any, written: Any, action: argparse.Action, kinds: Collection[Any], place: str) -> Any:
    if isinstance(value, Mapping):
        if dict in kinds or any(dataclasses.is_dataclass(kind) for kind in kinds):
            return value  # its dataclass converts and checks it
        raise UserValueError(f"{place} must be text, a number, true, false or a list of them; got {dict(value)!r}.")
    if value is None or isinstance(value, list):
        raise UserValueError(f"{place} must be {_wanted(kinds)}; got {value!r}.")
    if isinstance(value, bool | int | float):
        suits = [kind for kind in (bool, int, float) if kind in kinds and _suits(value, kind)]
        if suits:
            try:
                return _chosen(float(value) if suits[0] is float else value, action, place)
            except OverflowError:
                digits = len(str(value))
                raise UserValueError(f"{place} must be {_wanted(kinds)}; got one of {digits} digits.") from None
        if value is False and action.choices is not None and "no" in action.choices:
            return "no"  # YAML reads a bare `no` as false
        if str not in kinds and not any(inspect.isclass(kind) and issubclass(kind, str) for kind in kinds):
            raise UserValueError(f"{place} must be {_wanted(kinds)}; got {value!r}.")
        value = written if isinstance(written, str) else as_text(value)
    if dict in kinds and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError as error:
            raise UserValueError(f"{place}: not JSON ({error}): {value!r}.") from error
    try:
        converted = action.type(value) if callable(action.type) else value
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise UserValueError(f"{place}: {str(error).rstrip('.')}.") from error
    if action.nargs == 0 and not isinstance(converted, bool):
        raise UserValueError(f"{place} must be true or false; got {value!r}.")
    return _chosen(converted, action, place)


def _chosen(value: Any, action: argparse.Action, place: str) -> Any:
    if action.choices is None or value in action.choices:
        return value
    names = [str(choice) for choice in action.choices]
    raise UserValueError(f"{place} must be one of {', '.join(names)}; got {value!r}.{did_you_mean(str(value), names)}")


def _wanted(kinds: Collection[Any]) -> str:
    return " or ".join(_WORDS[kind] for kind in (bool, int, float, str) if kind in kinds) or "of another type"


def _suits(value: bool | int | float, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return kind is float or (kind is int and isinstance(value, int))
