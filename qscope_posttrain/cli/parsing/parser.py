"""One parser for every command: options of its own or the fields of dataclasses, from a recipe and the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, get_origin, get_type_hints

from qscope_posttrain.cli.parsing import recipes
from qscope_posttrain.cli.parsing.fields import HelpFormatter, add_fields, checked, kinds_of, kinds_of_option
from qscope_posttrain.cli.parsing.recipes import RecipeFile
from qscope_posttrain.cli.parsing.table import add_options
from qscope_posttrain.errors import UserValueError, did_you_mean, library_refusals

Command = Callable[[argparse.Namespace], int | None]
_LARGEST_SEED = (1 << 32) - 1


class CommandParser(argparse.ArgumentParser):
    """An argument parser that also reads recipes, and whose mistakes are ValueErrors with a suggestion.

    `--config FILE` gives options in a YAML file (`top_p: 0.9`, lists for several values, true and false for switches).
    The file comes first and the command line always wins, wherever `--config` stands: an option given there, or one
    that excludes it, replaces what the file says. Names may be written with dashes or underscores, never abbreviated.
    Values of a file are checked as those of the command line, unknown keys are errors, and what a file may set or run
    is limited: see `recipes`.

    Args:
        kinds: Dataclasses whose fields are options; `build` returns their instances. For a pair (dataclass, prefix) it
            returns the values that were given, by prefixed name.
        before_build: Called with all values before the dataclasses are made; may change them, or raise.
        mappings: Fields that take mappings in a file, where their type is the text of the command line.
        call: What `run` calls with the options of a parser without sub-commands.
    """

    def __init__(
        self,
        kinds: Sequence[type | tuple[type, str]] = (),
        before_build: Callable[[argparse.Namespace], None] | None = None,
        mappings: Collection[str] = (),
        call: Command | None = None,
        **settings: Any,
    ) -> None:
        settings.setdefault("epilog", recipes.HELP)
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **settings)
        self._before_build = before_build
        self._classes = [(entry, "") if isinstance(entry, type) else entry for entry in kinds]
        self._fields = [add_fields(self, kind, prefix) for kind, prefix in self._classes]
        self._kinds = {name: kinds_of(hint) for fields in self._fields for name, hint in fields.items()}
        for name in mappings:
            self._kinds[name].add(dict)
        self._call, self._commands = call, dict[str, Command]()
        self._choices: Any = None
        self.said: set[str] = set()  # The options that the command line gave, of what was parsed last
        self.values = argparse.Namespace()  # All values of what was built last

    def command(self, call: Command, *tables: str, name: str = "", **settings: Any) -> CommandParser:
        """Add a sub-command with the options of these tables, which `run` calls with its options. It has the name of
        the function and its docstring for a help text, unless others are given."""
        if self._choices is None:
            self._choices = self.add_subparsers(dest="action", required=True)
        name = name or call.__name__.replace("_", "-")
        self._commands[name] = call
        texts = {"help": (call.__doc__ or "").partition("\n")[0], "description": call.__doc__}
        parser: CommandParser = self._choices.add_parser(name, **{**texts, **settings})
        add_options(parser, *tables)
        return parser

    def run(self, arguments: Sequence[str]) -> int:
        """Call the sub-command that the arguments begin with, and return the exit status: its own, or 0."""
        options = self.parse(arguments)
        call = self._call or self._commands[options.action]
        return call(options) or 0

    def parse(self, arguments: Sequence[str], defaults: Mapping[str, Any] | None = None) -> argparse.Namespace:
        """Read the options. `defaults` replace those of the parser, and give way to the file and the command line.
        ValueError for an unknown, missing or malformed option or key, or code without `--allow-code`."""
        options, recipe = self._read(arguments, defaults)
        for name, value in vars(options).items():
            if name.startswith("max_") and isinstance(value, int) and value < 1:
                raise UserValueError(f"{name} must be at least 1; got {value}.")
        check_seed("seed", getattr(options, "seed", None))
        with recipes.environment_of(recipe):
            return options

    def build(self, arguments: Sequence[str], defaults: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """Read the options and make the dataclasses of them, in their order. ValueError as `parse`, or for a value that
        a dataclass refuses."""
        options, recipe = self._read(arguments, defaults)
        self.values = options
        with recipes.environment_of(recipe), library_refusals():
            if self._before_build is not None:
                self._before_build(options)
            made: list[Any] = []
            for (kind, prefix), names in zip(self._classes, self._fields, strict=True):
                values = {name: getattr(options, name) for name in names}
                if prefix:
                    made.append({name: value for name, value in values.items() if value is not None})
                    continue
                tuples = {name for name, hint in get_type_hints(kind).items() if get_origin(hint) is tuple}
                made.append(kind(**values | {name: tuple(values[name]) for name in tuples & values.keys()}))
            return tuple(made)

    def checked(self, values: Mapping[str, Any], written: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Values of known keys, converted as the command line would; `written` is how a file writes them."""
        actions = self._by_name()
        found = {}
        for key, value in values.items():
            action = actions[key]
            kinds = self._kinds.get(key) or kinds_of_option(action)
            found[key] = checked(value, written.get(key), action, kinds, f"{place}: {key}")
            if found[key] == [] and action.nargs == "+" and key not in self._kinds:
                raise UserValueError(f"{place}: {key} must hold at least one value; got an empty list.")
        return found

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print above the usage of up to two hundred options."""
        raise UserValueError(f"{message} (see `{self.prog} --help`)")

    def _read(
        self, arguments: Sequence[str], defaults: Mapping[str, Any] | None
    ) -> tuple[argparse.Namespace, RecipeFile | None]:
        tokens, recipe, allowed = list(arguments), None, False
        if "--config" not in self._option_string_actions:  # `qscope experiment` reads its own
            tokens, path, allowed = recipes.split_arguments(arguments)
            recipe = None if path is None else recipes.read_recipe(path)
        parser = self._chosen(tokens)
        tokens = [parser._spelled(token) for token in tokens]
        self.said = parser.said = recipes.given_names(tokens, parser._option_string_actions)
        parser._set_defaults(defaults or {})
        if recipe is not None:
            values = parser._set_from_file(recipe)
            recipes.check_code(recipe, values, allowed)
            recipes.check_secrets(recipe, values, parser.said)
        options, unknown = self.parse_known_args(tokens)
        if unknown:
            names = [token.partition("=")[0] for token in unknown if token.startswith("--")]
            if not names:
                raise UserValueError(f"unexpected words on the command line: {' '.join(unknown)}.")
            known = sorted(parser._option_string_actions)
            raise UserValueError(" ".join(f"unknown option '{name}'.{did_you_mean(name, known)}" for name in names))
        return options, recipe

    def _chosen(self, tokens: Sequence[str]) -> CommandParser:
        """The parser of the sub-command that the tokens begin with, or this one."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and tokens:
                return action.choices.get(tokens[0], self)
        return self

    def _spelled(self, token: str) -> str:
        """An option as it was declared, whether it is written with dashes or underscores."""
        name, equals, value = token.partition("=")
        if len(name) > 2 and name.startswith("--"):
            for spelling in (name.replace("_", "-"), "--" + name[2:].replace("-", "_")):
                if spelling in self._option_string_actions:
                    return spelling + equals + value
        return token

    def _by_name(self) -> dict[str, argparse.Action]:
        """The options by name; of a pair the first, not `--no_x`."""
        actions = [action for action in self._actions if action.option_strings and action.dest != "help"]
        return {action.dest: action for action in reversed(actions)}

    def _set_defaults(self, values: Mapping[str, Any]) -> None:
        for action in self._actions:
            if action.dest in values:
                action.default = values[action.dest]
                action.required = action.required and action.default is None

    def _set_from_file(self, recipe: RecipeFile) -> dict[str, Any]:
        """Make the file's values defaults, and return those that the command line does not replace."""
        names = self._by_name()
        if unknown := [key for key in recipe.values if key not in names]:
            raise recipes.unknown_keys(recipe, unknown, names, self.prog)
        values = self.checked(recipe.values, recipe.words, str(recipe.path))
        replaced = set(self.said)
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
        self._set_defaults(taken)
        return taken


def check_seed(name: str, seed: int | None) -> None:
    """ValueError for a seed that not every random generator takes."""
    if seed is not None and not 0 <= seed <= _LARGEST_SEED:
        raise UserValueError(f"{name} must be a whole number from 0 to {_LARGEST_SEED}; got {seed}.")
