"""Frozen configuration dataclasses as arguments of a recipe."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from qscope_posttrain.cli.sft_arguments import field_docstrings

T = TypeVar("T")


def arguments_of(kind: type) -> type:
    """A dataclass with the fields of `kind` in types that an argument parser knows, and their docstrings as help."""
    hints, explanations = get_type_hints(kind), field_docstrings(kind)
    fields: list[tuple[str, Any, Any]] = []
    for option in dataclasses.fields(kind):
        # A percent sign in a help text would be read by argparse as a format.
        settings: dict[str, Any] = {"metadata": {"help": explanations.get(option.name, "").replace("%", "%%")}}
        hint, default = hints[option.name], option.default
        if get_origin(hint) is tuple:
            hint = list[get_args(hint)[0]]  # type: ignore[misc]
            settings["default_factory"] = lambda value=default: list(value)
        else:
            settings["default"] = default
        fields.append((option.name, hint, dataclasses.field(**settings)))
    return dataclasses.make_dataclass(f"{kind.__name__}Arguments", fields)


def config_from(kind: type[T], arguments: Any) -> T:
    """The configuration that was asked for. ValueError as `kind` raises it."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(arguments).items()}
    return kind(**values)
