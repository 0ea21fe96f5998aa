"""A recipe and a command line, read strictly: TRL's parser, in which a misspelt key is an error with a suggestion."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, get_type_hints

from trl import TrlParser

from qscope_posttrain.cli import recipe_keys
from qscope_posttrain.cli.recipe_values import checked, kinds_of
from qscope_posttrain.errors import UserValueError, did_you_mean, library_refusals


class RecipeParser(TrlParser):
    """`TrlParser` for recipes: every key of the YAML file is a dataclass field, and every field is an option.

    The command line overrides the file, wherever `--config FILE` stands. Stricter than in TRL are:

    - unknown keys, in the file and on the command line, raise a ValueError that suggests the nearest field;
    - values from the file are checked like values from the command line (type, choices, list or single value), where
      argparse takes a default as it is;
    - the file's `env` sets few variables, and code that the file names needs `--allow-code`: see `recipe_keys`;
    - no abbreviation: `--learn 1e-5` is an error, not a learning rate.

    Names may be written with dashes or underscores. Mistakes raise ValueError instead of ending the process.
    """

    def __init__(
        self,
        dataclass_types: Sequence[Any],
        before_build: Callable[[argparse.Namespace], None] | None = None,
        mappings: Collection[str] = (),
        **options: Any,
    ) -> None:
        """`before_build` sees all values before the dataclasses are made of them, and may change them or raise.

        `mappings` are fields that take mappings in a file, where their type is the text of the command line.
        """
        self._kinds = {name: kinds_of(hint) for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
        for name in mappings:
            self._kinds[name].add(dict)
        super().__init__(dataclass_types, allow_abbrev=False, epilog=recipe_keys.HELP, **options)
        self._before_build = before_build
        self.said: set[str] = set()
        """The fields that the command line gave, of what was parsed last"""

    def parse(self, arguments: Sequence[str], defaults: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """Instances of the dataclasses, in their order.

        Args:
            defaults: Values that go before the dataclasses' own, and behind the file and the command line.

        Raises:
            FileNotFoundError: the recipe does not exist.
            ValueError: unknown key, wrong type, code without `--allow-code`, or a value that a dataclass refuses.
        """
        tokens, path, allowed = recipe_keys.split_arguments(arguments)
        tokens = [_with_underscores(token) for token in tokens]
        recipe = None if path is None else recipe_keys.read_recipe(path)
        self.said = recipe_keys.given_names(tokens, self._option_string_actions)
        self.set_defaults_with_config(**(defaults or {}))
        if recipe is not None:
            names = self._names()
            if unknown := [key for key in recipe.values if key not in names]:
                raise recipe_keys.unknown_keys(recipe, unknown, names, self.prog)
            values = self.checked(recipe.values, recipe.words, str(recipe.path))
            self.set_defaults_with_config(**values)
            recipe_keys.check_code(recipe, {key: values[key] for key in values if key not in self.said}, allowed)
        with recipe_keys.environment_of(recipe), library_refusals():
            return tuple(self.parse_args_into_dataclasses(args=tokens, look_for_args_file=False))

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As in argparse, but what is unknown raises here, with a suggestion."""
        values, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [token[2:].partition("=")[0] for token in unknown if token.startswith("--")]
            if not options:
                raise UserValueError(f"unexpected words on the command line: {' '.join(unknown)}.")
            names = self._names()
            raise UserValueError(
                " ".join(f"unknown key '{key}' in the command line.{did_you_mean(key, names)}" for key in options)
            )
        if self._before_build is not None:
            self._before_build(values)
        return values, unknown

    def error(self, message: str) -> NoReturn:
        """argparse would print the usage of some two hundred options and exit; the reason alone is the message."""
        raise UserValueError(message)

    def checked(self, values: Mapping[str, Any], written: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Values of known keys, converted as the command line would; `written` is how a file writes them."""
        actions = {action.dest: action for action in reversed(self._actions)}  # the first of a pair: not `--no_x`
        return {
            key: checked(value, written.get(key), actions[key], self._kinds[key], f"{place}: {key}")
            for key, value in values.items()
        }

    def _names(self) -> list[str]:
        return sorted({action.dest for action in self._actions if action.dest != "help"})


def _with_underscores(token: str) -> str:
    if not token.startswith("--") or token == "--":
        return token
    name, equals, value = token.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
