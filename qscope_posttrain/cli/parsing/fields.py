"""Convert dataclasses into command-line options, from the class or, for help texts, from its source alone; and check a
value of a recipe as the command line would."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import textwrap
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import qscope_posttrain
from qscope_posttrain.cli.parsing.recipes import HELP
from qscope_posttrain.errors import UserValueError, did_you_mean
from qscope_posttrain.files import read_text
from qscope_posttrain.recipe_file import as_text

T = TypeVar("T")
_TRUTHS = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)
_REQUIRED = "required"


class Declared(NamedTuple):
    """A field of a dataclass as its source declares it."""

    type: str
    default: str
    help: str


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Marks required options, adds the defaults that say something, and never breaks the name of an option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required and action.option_strings:
            return f"{action.help} ({_REQUIRED})"
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent("\n".join(self._split_lines(text, width - len(indent))), indent)


def add_fields(parser: argparse.ArgumentParser, kind: type, prefix: str = "") -> dict[str, Any]:
    """Add one option per field of a dataclass, and return the declared types that they stand for. Help is
    `metadata={"help": ...}`, or the docstring below the field. With a prefix, the names begin with it, and an option
    that is not given is None: given values are distinct from defaults."""
    hints, added = get_type_hints(kind), {}
    documented = field_help(kind)
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        hint, settings = _parsable(hints[field.name]), dict(field.metadata)  # for argparse, in TRL and transformers
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in documented and "help" not in settings:
            settings["help"] = documented[field.name].replace("%", "%%")
        if prefix:
            settings["help"] += _default_text(repr(default)).replace("%", "%%") + "%(default).0s"
            hint, default = hint | None, None
        name = prefix + field.name
        added[name] = hint
        _add_field(parser, name, hint, default, settings)
    return added


def print_declared(
    arguments: Sequence[str], prog: str, declared: Sequence[tuple[str, ...]], description: str = ""
) -> None:
    """Print the help of dataclasses, (module, class, prefix) each, and exit, where `--help` asks for it. They are not
    imported: their modules may import torch or TRL."""
    if {"-h", "--help"}.isdisjoint(arguments):
        return
    usage = f"{prog} [--config FILE] [--KEY VALUE ...]"
    words: dict[str, Any] = {"usage": usage, "description": description, "epilog": HELP}
    parser = argparse.ArgumentParser(prog=prog, formatter_class=HelpFormatter, **words)
    for module, kind, *prefix in declared:
        for name, (hint, default, text) in declared_fields(module, kind).items():
            option = "".join([*prefix, name])
            help_text = (text + _default_text(default)).replace("%", "%%")
            parser.add_argument(f"--{option}", metavar=_metavar(hint), help=help_text)
            if (hint, default) == ("bool", "True"):
                parser.add_argument(f"--no_{option}", action="store_true", help=f"the opposite of --{option}")
    parser.parse_args(["--help"])


@cache
def declared_fields(module: str, kind: str) -> Mapping[str, Declared]:
    """Read the fields of a dataclass of this package, and of its bases in the same module, from the source. Help is
    `metadata={"help": ...}`, or the docstring below the field."""
    path = Path(qscope_posttrain.__file__).parents[1].joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(read_text(path))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    found: dict[str, Declared] = {}
    for base in classes[kind].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found |= declared_fields(module, base.id)
    body = classes[kind].body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = str(following.value.value)
        parts = ast.unparse(statement.annotation).split(" | ")
        hint = " | ".join(ast.unparse(constants[part]) if part in constants else part for part in parts)
        found[statement.target.id] = Declared(hint, _default(statement.value), " ".join(text.split()))
    return found


def field_help(kind: type) -> dict[str, str]:
    """The help of the fields of a dataclass, and of those that it extends, as far as they are in this package."""
    parts = [part for part in reversed(kind.__mro__) if part.__module__.startswith(f"{qscope_posttrain.__name__}.")]
    return {
        name: field.help for part in parts for name, field in declared_fields(part.__module__, part.__name__).items()
    }


def as_bool(text: str | bool) -> bool:
    """Read yes/no, true/false, t/f, y/n or 1/0."""
    if isinstance(text, bool):
        return text
    if text.lower() not in _TRUTHS:
        raise argparse.ArgumentTypeError(f"Truthy value expected: got {text} but expected yes/no, true/false or 1/0.")
    return _TRUTHS[text.lower()]


def _add_field(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, settings: dict[str, Any]) -> None:
    (kind, takes_none), text = _single(hint), settings.get("help")
    if default is dataclasses.MISSING and kind is bool:
        default = False
    settings |= {"required": True} if default is dataclasses.MISSING else {"default": default}
    truth = kind is bool or kind == bool | None
    if get_origin(kind) is Literal or (inspect.isclass(kind) and issubclass(kind, Enum)):
        choices = get_args(kind) or [member.value for member in kind]
        by_text = {str(choice): choice for choice in choices}
        settings |= {"choices": choices, "type": lambda text: by_text.get(text, text)}
    elif truth:
        settings["type"] = as_bool
        if kind is bool or default is not None:
            settings |= {"nargs": "?", "const": True}
    elif get_origin(kind) is list:
        default = list(default) if isinstance(default, list | tuple) else None
        settings |= {"type": get_args(kind)[0], "nargs": "+", "default": default}
    else:
        settings["type"] = _or_none(kind) if takes_none else kind
    parser.add_argument(f"--{name}", **settings)
    if truth and default is True:  # after the option itself: the first action of a pair is the one that counts
        parser.add_argument(f"--no_{name}", action="store_false", dest=name, default=False, help=text)


def _single(hint: Any) -> tuple[Any, bool]:
    """The one type that argparse takes for a union, by TRL's rule, and whether `none` on the command line is None."""
    members = get_args(hint)
    if get_origin(hint) not in (Union, types.UnionType) or {bool, type(None)} <= set(members):
        return hint, False
    if type(None) not in members:
        return members[0 if members[1] is str else 1], False
    kind = members[0 if members[1] is type(None) else 1]
    return kind, kind is not str


def _or_none(kind: Callable[[str], T]) -> Callable[[str], T | None]:
    def parse(text: str) -> T | None:
        return None if text.lower() in ("none", "null") else kind(text)

    parse.__name__ = getattr(kind, "__name__", "value")  # argparse puts it into its messages
    return parse


def _parsable(hint: Any) -> Any:
    """A list for a tuple, and no callables, which no text can give."""
    if get_origin(hint) is tuple:
        return list[get_args(hint)[0]]  # type: ignore[misc]
    if get_origin(hint) in (Union, types.UnionType):
        kept = [_parsable(kind) for kind in get_args(hint) if get_origin(kind) is not Callable]
        return Union[tuple(kept)]  # noqa: UP007 - the members are computed
    return hint


def _default(value: ast.expr | None) -> str:
    """The default that a field's right-hand side gives, as written."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field")):
        return _REQUIRED if value is None else ast.unparse(value)
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    factory = given.get("default_factory")
    if factory is not None:
        return ast.unparse(factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], []))
    return ast.unparse(given["default"]) if "default" in given else _REQUIRED


def _default_text(default: str) -> str:
    if default in ("None", _REQUIRED):
        return f" ({_REQUIRED})" if default == _REQUIRED else ""
    return f" (default: {default.strip(chr(39))})"


def _metavar(hint: str) -> str:
    """The placeholder of a value in a help text: FLOAT, STR ... for a list, {a,b} for choices."""
    kinds = [part for part in hint.split(" | ") if part != "None"]
    if kinds[0].startswith("Literal["):
        return "{" + ",".join(str(choice) for choice in ast.literal_eval(kinds[0].removeprefix("Literal"))) + "}"
    inner = kinds[0].removeprefix("tuple[").removeprefix("list[").rstrip("], .")
    many = " ..." if inner != kinds[0] else ""
    return (inner.upper() if inner in ("str", "int", "float", "bool") else "NAME") + many


def checked(value: Any, written: Any, action: argparse.Action, kinds: Collection[Any], place: str) -> Any:
    """The value for this option; null where the option may be left without one. ValueError for another type, another
    number of values, or none of the choices.

    Args:
        written: The value as the file writes it, for options that take text: 7, 007 and no are text there.
        kinds: The types that it may have, from `kinds_of` or `kinds_of_option`.
        place: File and key, for messages.
    """
    if value is None:
        if type(None) in kinds or action.default is None:
            return None
        raise UserValueError(f"{place} must be {_wanted(kinds)}; got null. Leave the key out for its default.")
    if not isinstance(value, list):
        found = [_item(value, written, action, kinds, place)]
        if not action.nargs or action.nargs == "?":
            return found[0]
    elif list not in kinds:
        raise UserValueError(f"{place} must be a single value; got {value!r}.")
    else:
        if not isinstance(written, list) or len(written) != len(value):  # it comes from an alias, which is not followed
            written = as_text(value)
        found = [_item(item, text, action, kinds, place) for item, text in zip(value, written, strict=True)]
    if isinstance(action.nargs, int) and len(found) != action.nargs:
        raise UserValueError(f"{place} must be a list of {action.nargs} values; got {found!r}.")
    return found


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
    refusal = UserValueError(f"{place} must be {_wanted(kinds)}; got {value!r}.")
    if value is None or isinstance(value, list):
        raise refusal
    if type(value) in kinds and type(value) is not str:
        return _chosen(value, action, place)
    if type(value) is int and float in kinds:
        try:
            return _chosen(float(value), action, place)
        except OverflowError:
            raise UserValueError(f"{place} must be a number; got one of {len(str(value))} digits.") from None
    if value is False and action.choices is not None and "no" in action.choices:
        return "no"  # YAML reads a bare `no` as false
    if isinstance(value, bool | int | float):
        if not any(inspect.isclass(kind) and issubclass(kind, str) for kind in kinds):
            raise refusal
        value = written if isinstance(written, str) else as_text(value)
    try:
        if dict in kinds and value.lstrip().startswith("{"):
            return json.loads(value)
        converted = action.type(value) if callable(action.type) else value
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        reason = f"not JSON ({error}): {value!r}" if isinstance(error, json.JSONDecodeError) else str(error).rstrip(".")
        raise UserValueError(f"{place}: {reason}.") from error
    if action.nargs == 0 and not isinstance(converted, bool):
        raise UserValueError(f"{place} must be true or false; got {value!r}.")
    return _chosen(converted, action, place)


def _chosen(value: Any, action: argparse.Action, place: str) -> Any:
    if action.choices is None or value in action.choices:
        return value
    names = [str(choice) for choice in action.choices]
    raise UserValueError(f"{place} must be one of {', '.join(names)}; got {value!r}.{did_you_mean(str(value), names)}")


def _wanted(kinds: Collection[Any]) -> str:
    words = {bool: "a truth value", int: "a whole number", float: "a number", str: "text"}
    return " or ".join(word for kind, word in words.items() if kind in kinds) or "of another type"
