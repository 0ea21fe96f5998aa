"""A recipe and a command line, read strictly: TRL's parser, in which a misspelt key is an error with a suggestion."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from trl import TrlParser

from qscope_posttrain.cli.options import did_you_mean
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.recipe_file import read_yaml

_WORDS: dict[Any, str] = {bool: "a truth value", int: "a whole number", float: "a number", str: "text"}


class RecipeParser(TrlParser):
    """`TrlParser` for recipes: every key of the YAML file is a dataclass field, and every field is an option.

    The command line overrides the file. Three things are stricter than in TRL:

    - unknown keys, in the file and on the command line, raise a ValueError that suggests the nearest field;
    - values from the file are checked like values from the command line (type, choices, list or single value), where
      argparse takes a default as it is;
    - no abbreviation: `--learn 1e-5` is an error, not a learning rate.

    `--config FILE` and `--config=FILE` both work. Mistakes raise ValueError instead of ending the process.
    """

    def __init__(
        self,
        dataclass_types: Sequence[Any],
        before_build: Callable[[argparse.Namespace], None] | None = None,
        **options: Any,
    ) -> None:
        """`before_build` sees all values before the dataclasses are made of them, and may change them or raise."""
        self._hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
        super().__init__(dataclass_types, allow_abbrev=False, **options)
        self._before_build = before_build

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Instances of the dataclasses, in their order.

        Raises:
            FileNotFoundError: the recipe does not exist.
            ValueError: unknown key, wrong type, or a value that a dataclass refuses.
        """
        tokens, path = _split_config(arguments)
        if path is not None:
            self._set_from_file(path)
        return tuple(self.parse_args_into_dataclasses(args=tokens, look_for_args_file=False))

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As in argparse, but what is unknown raises here, with a suggestion."""
        values, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [token for token in unknown if token.startswith("--")]
            if not options:
                raise UserValueError(f"unexpected words on the command line: {' '.join(unknown)}.")
            raise UserValueError(
                " ".join(self._unknown(token[2:].split("=")[0], "the command line") for token in options)
            )
        if self._before_build is not None:
            self._before_build(values)
        return values, unknown

    def error(self, message: str) -> NoReturn:
        """argparse would print the usage of some two hundred options and exit; the reason alone is the message."""
        raise UserValueError(message)

    def _set_from_file(self, path: Path) -> None:
        recipe = read_yaml(path)
        environment = recipe.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise UserValueError(f"{path}: 'env' must map variable names to values, got {environment!r}.")
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        actions = {action.dest: action for action in reversed(self._actions)}  # the first of a pair: not `--no_x`
        complaints = [self._unknown(str(key), str(path)) for key in recipe if key not in actions]
        if complaints:
            raise UserValueError(" ".join(complaints))
        self.set_defaults_with_config(
            **{key: _checked(value, actions[key], self._hints[key], f"{path}: {key}") for key, value in recipe.items()}
        )

    def _unknown(self, key: str, place: str) -> str:
        names = sorted({action.dest for action in self._actions if action.dest != "help"})
        return f"unknown key '{key}' in {place}.{did_you_mean(key.replace('-', '_'), names)}"


def _split_config(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The other tokens, and the file named by `--config FILE` or `--config=FILE`."""
    rest: list[str] = []
    found: list[str] = []
    tokens = iter(arguments)
    for token in tokens:
        if token == "--config":
            value = next(tokens, "")
            if not value or value.startswith("--"):
                raise UserValueError("--config needs a file, for example --config recipes/testbed/sasft.yaml.")
            found.append(value)
        elif token.startswith("--config="):
            found.append(token.partition("=")[2])
        else:
            rest.append(token)
    if len(found) > 1:
        raise UserValueError(f"--config was given {len(found)} times: {', '.join(found)}. Give one recipe.")
    return rest, Path(found[0]) if found else None


def _checked(value: Any, action: argparse.Action, hint: Any, place: str) -> Any:
    """A value from the file as the command line would have read it; null stays null.

    `hint` is the declared type: some fields of TrainingArguments take a list or a truth value beside the one type that
    argparse knows.
    """
    if value is None:
        return None
    kinds = _kinds(hint)
    if isinstance(value, list):
        if list not in kinds:
            raise UserValueError(f"{place} must be a single value; got {value!r}.")
        return [_checked_item(item, action, kinds, place) for item in value]
    item = _checked_item(value, action, kinds, place)
    return [item] if action.nargs in ("+", "*") else item


def _checked_item(value: Any, action: argparse.Action, kinds: set[Any], place: str) -> Any:
    if isinstance(value, dict | list):  # a structured field: its dataclass converts and checks it
        return value
    if value is False and action.choices is not None and "no" in action.choices:
        return "no"  # YAML reads a bare `no` as false
    if isinstance(value, bool | int | float):
        suits = [kind for kind in (bool, int, float, str) if kind in kinds and _suits(value, kind)]
        if suits:
            return float(value) if suits[0] is float else value
        wanted = " or ".join(_WORDS[kind] for kind in (bool, int, float, str) if kind in kinds) or "another type"
        raise UserValueError(f"{place} must be {wanted}; got {value!r}.")
    try:
        converted = action.type(value) if callable(action.type) else value
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise UserValueError(f"{place}: {str(error).rstrip('.')}.") from error
    if action.choices is not None and converted not in action.choices:
        names = [str(choice) for choice in action.choices]
        raise UserValueError(
            f"{place} must be one of {', '.join(names)}; got {value!r}.{did_you_mean(str(value), names)}"
        )
    return converted


def _suits(value: bool | int | float, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return kind is float or kind is str or (kind is int and isinstance(value, int))


def _kinds(hint: Any) -> set[Any]:
    """The plain types that a declared type admits, at any depth; `list` among them where it admits a list."""
    origin = get_origin(hint)
    if origin is Literal:
        return {type(value) for value in get_args(hint)}
    if origin is None:
        return {hint}
    inner = set().union(*(_kinds(argument) for argument in get_args(hint)))
    return inner | {list} if origin is list else inner
