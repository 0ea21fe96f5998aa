"""Command lines of the commands that do not train: argparse, with the manners of the recipe parser."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.recipe_file import read_yaml

DTYPES = ("auto", "float32", "bfloat16", "float16")


class OptionParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are ValueErrors, with a suggestion for an unknown option.

    Options may be written with dashes or underscores (`--top-p`, `--top_p`), never abbreviated, and kept in a recipe:
    `--config FILE` stands for the options in a YAML file (`top_p: 0.9`, lists for several values, true and false for
    switches); what comes after it on the command line goes before what it says.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **settings)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options.

        Raises:
            ValueError: an unknown, missing or malformed option.
        """
        given = [_with_dashes(argument) for argument in arguments]
        names = _option_names(self)
        if "--config" not in names:
            given = _with_recipes(given, names)
        values, unknown = self.parse_known_args(given)
        if unknown:
            name = unknown[0].partition("=")[0]
            raise UserValueError(f"unknown option '{name}'.{did_you_mean(name, sorted(names))}")
        return values

    def error(self, message: str) -> NoReturn:
        raise UserValueError(f"{message} (see `{self.prog} --help`)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --revision, --dtype, --device: what `inputs.load_model` takes."""
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the hub")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model; auto is float32 on a CPU")
    parser.add_argument("--device", help="for example cuda:0 or cpu; by default the first GPU if there is one")


def given_options(options: argparse.Namespace, defaults: Mapping[str, Any]) -> str:
    """The options that differ from their defaults, as they are written: `--top-p, --seed`; empty without any."""
    given = (name for name, default in defaults.items() if getattr(options, name) != default)
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A sentence that suggests the nearest name, or nothing."""
    close = difflib.get_close_matches(word, list(names), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _with_recipes(arguments: Sequence[str], names: Collection[str]) -> list[str]:
    """The arguments with every `--config FILE` replaced by the options in that file."""
    expanded: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--config":
            expanded.append(argument)
            continue
        path = value if equals else next(rest, None)
        if not path:
            raise UserValueError("--config needs a YAML file with options.")
        for key, content in read_yaml(path).items():
            expanded += _as_arguments(path, key, content, names)
    return expanded


def _as_arguments(path: str, key: Any, content: Any, names: Collection[str]) -> list[str]:
    name = _with_dashes(f"--{key}")
    if content is None:
        return []
    if isinstance(content, bool):
        if content or name not in names:
            return [name]
        off = f"--no-{name[2:]}"
        return [off] if off in names else []  # a switch without that form is off unless it is named
    values = content if isinstance(content, list) else [content]
    if any(not isinstance(value, (str, int, float)) or isinstance(value, bool) for value in values):
        raise UserValueError(f"{path}: {key!r} must be text, a number, true, false or a list of texts and numbers.")
    if len(values) == 1:
        return [f"{name}={values[0]}"]
    return [name, *map(str, values)]


def _with_dashes(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _option_names(parser: argparse.ArgumentParser) -> set[str]:
    names = {name for action in parser._actions for name in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names.update(*(_option_names(choice) for choice in action.choices.values()))
    return names
