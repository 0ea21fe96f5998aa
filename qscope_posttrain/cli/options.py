"""Command lines of the commands that do not train: argparse, with the manners of the recipe parser."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from qscope_posttrain.cli import recipe_keys
from qscope_posttrain.cli.recipe_keys import RecipeFile
from qscope_posttrain.cli.recipe_values import checked, kinds_of_option
from qscope_posttrain.errors import UserValueError, did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16")


class OptionParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are ValueErrors, with a suggestion for an unknown option.

    Options may be written with dashes or underscores (`--top-p`, `--top_p`), never abbreviated, and kept in a recipe:
    `--config FILE` stands for the options in a YAML file (`top_p: 0.9`, lists for several values, true and false for
    switches). What the command line says wins, wherever `--config` stands: an option given there, or one that excludes
    it, replaces what the file says.
    """

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("epilog", recipe_keys.HELP)
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **settings)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options.

        Raises:
            FileNotFoundError: no such recipe.
            ValueError: an unknown, missing or malformed option or key.
        """
        tokens, recipe = list(arguments), None
        if "--config" not in self._option_string_actions:
            tokens, path, allowed = recipe_keys.split_arguments(arguments)
            recipe = None if path is None else recipe_keys.read_recipe(path)
        tokens = [_with_dashes(token) for token in tokens]
        parser = self._chosen(tokens)
        if recipe is not None:
            values = parser._set_from_file(recipe, tokens)
            recipe_keys.check_code(recipe, values, allowed)
            given = recipe_keys.given_names(tokens, parser._option_string_actions)
            recipe_keys.check_secrets(recipe, values, given)
        options, unknown = self.parse_known_args(tokens)
        if unknown:
            name = unknown[0].partition("=")[0]
            raise UserValueError(f"unknown option '{name}'.{did_you_mean(name, sorted(parser._option_string_actions))}")
        _check_numbers(options)
        with recipe_keys.environment_of(recipe):
            return options

    def error(self, message: str) -> NoReturn:
        raise UserValueError(f"{message} (see `{self.prog} --help`)")

    def _chosen(self, tokens: Sequence[str]) -> OptionParser:
        """The parser of the sub-command that the tokens begin with, or this one."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and tokens:
                chosen: OptionParser = action.choices.get(tokens[0], self)
                return chosen
        return self

    def _set_from_file(self, recipe: RecipeFile, tokens: Sequence[str]) -> dict[str, Any]:
        """Make the file's values defaults, and return those that the command line does not replace."""
        actions = {action.dest: action for action in self._actions if action.option_strings and action.dest != "help"}
        names = {f"--{name.replace('_', '-')}": name for name in actions}
        if unknown := [name for key in recipe.values if (name := f"--{key.replace('_', '-')}") not in names]:
            raise recipe_keys.unknown_keys(recipe, unknown, names, self.prog)
        values = {
            key: checked(value, recipe.words[key], actions[key], kinds_of_option(actions[key]), f"{recipe.path}: {key}")
            for key, value in recipe.values.items()
        }
        for key, value in values.items():
            _check_number_of_values(actions[key], value, f"{recipe.path}: {key}")
        replaced = recipe_keys.given_names(tokens, self._option_string_actions)
        for group in self._mutually_exclusive_groups:
            members = [action.dest for action in group._group_actions]
            here = [key for key in members if values.get(key) is not None]
            if len(here) > 1:
                raise UserValueError(f"{recipe.path}: give one of {', '.join(here)}; they exclude each other.")
            if replaced.intersection(members):
                replaced.update(members)
            elif here:
                group.required = False
        taken = {key: value for key, value in values.items() if key not in replaced}
        for key, value in taken.items():
            actions[key].default = value
            actions[key].required = actions[key].required and value is None
        return taken


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


def _check_numbers(options: argparse.Namespace) -> None:
    """ValueError for a limit (`--max-...`) below 1, or a seed that not every generator takes."""
    for name, value in vars(options).items():
        if name.startswith("max_") and isinstance(value, int) and value < 1:
            raise UserValueError(f"{name} must be at least 1; got {value}.")
        if name == "seed" and not 0 <= value < 1 << 32:
            raise UserValueError(f"seed must be a whole number from 0 to {(1 << 32) - 1}; got {value}.")


def _check_number_of_values(action: argparse.Action, value: Any, place: str) -> None:
    if action.nargs == "+" and value == []:
        raise UserValueError(f"{place} must hold at least one value; got an empty list.")
    if isinstance(action.nargs, int) and action.nargs and value is not None and len(value) != action.nargs:
        raise UserValueError(f"{place} must be a list of {action.nargs} values; got {value!r}.")


def _with_dashes(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
