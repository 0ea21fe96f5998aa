"""Frozen configuration dataclasses as arguments of a recipe."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import inspect
import itertools
import textwrap
import types
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def arguments_of(kind: type, prefix: str = "") -> type:
    """A dataclass with the fields of `kind` in types that an argument parser knows, and their docstrings as help.

    Made from `kind`, so that there is one place where an option is declared, documented and checked.

    With a prefix the names begin with it, since `weight` or `top` alone would say little beside two hundred of TRL's,
    and a field that is not given is None, so that what was asked for can be told from what was not.
    """
    hints, explanations = get_type_hints(kind), field_docstrings(kind)
    fields: list[tuple[str, Any, Any]] = []
    for option in dataclasses.fields(kind):
        # A percent sign in a help text would be read by argparse as a format.
        text = explanations.get(option.name, "").replace("%", "%%")
        hint, default = _parsable(hints[option.name]), option.default
        if prefix:
            # argparse would add its own default, None.
            text, hint, default = f"{text} (default: {default})%(default).0s", hint | None, None
        settings: dict[str, Any] = {"metadata": {"help": text}}
        if isinstance(default, tuple):
            settings["default_factory"] = lambda value=default: list(value)
        else:
            settings["default"] = default
        fields.append((prefix + option.name, hint, dataclasses.field(**settings)))
    return dataclasses.make_dataclass(f"{kind.__name__}Arguments", fields)


def config_from(kind: type[T], arguments: Any) -> T:
    """The configuration that was asked for. ValueError as `kind` raises it."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(arguments).items()}
    return kind(**values)


def field_docstrings(kind: type) -> dict[str, str]:
    """The help of the fields of a dataclass: their metadata, or else the strings below them, as one line each."""
    found: dict[str, str] = {}
    for part in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        helps = {option.name: option.metadata["help"] for option in dataclasses.fields(part) if option.metadata}
        if helps:
            found |= helps
            continue
        body = cast("ast.ClassDef", ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]).body
        for previous, statement in itertools.pairwise(body):
            if not (isinstance(previous, ast.AnnAssign) and isinstance(previous.target, ast.Name)):
                continue
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                found[previous.target.id] = " ".join(str(statement.value.value).split())
    return found


def _parsable(hint: Any) -> Any:
    """A type that an argument parser can read: a list for a tuple, and no callables, which no text can give."""
    if get_origin(hint) is tuple:
        return list[get_args(hint)[0]]  # type: ignore[misc]
    if get_origin(hint) in (Union, types.UnionType):
        kept = [_parsable(kind) for kind in get_args(hint) if get_origin(kind) is not collections.abc.Callable]
        return Union[tuple(kept)]  # noqa: UP007 - the members are computed
    return hint
