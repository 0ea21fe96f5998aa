"""The public names, their signatures and their public methods stay as they were."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import golden_file

import qscope_posttrain as qp

NAMES = tuple(name for name in qp.__all__ if name != "__version__")


def describe(thing: Any) -> dict[str, Any]:
    """Signature of a function; arguments or own fields of a class, and the methods and properties that callers use.

    What a class has from a library, such as the 200 fields of TRL's configurations, is left out.
    """
    if not inspect.isclass(thing):
        return {"arguments": arguments_of(thing)}
    elsewhere = [base for base in thing.__mro__ if not base.__module__.startswith("qscope_posttrain.")]
    if not dataclasses.is_dataclass(thing):
        methods = {name: arguments_of(getattr(thing, name)) for name in ("attach", "detach") if hasattr(thing, name)}
        return {"arguments": arguments_of(thing), **methods}
    old = {name: field for base in elsewhere[::-1] for name, field in getattr(base, "__dataclass_fields__", {}).items()}
    # A parser of a dataclass replaces the text of an annotation in its fields by the type.
    written = {name: text for base in reversed(thing.__mro__) for name, text in inspect.get_annotations(base).items()}
    found: dict[str, Any] = {
        "fields": [
            f"{field.name}: {written[field.name]} = {default_of(field)}"
            for field in dataclasses.fields(thing)
            if field.name not in old or old[field.name].default is not field.default
        ]
    }
    inherited = {name for base in elsewhere for name in dir(base)} | set(thing.__dataclass_fields__)
    for name in dir(thing):
        if not name.startswith("_") and name not in inherited:
            member = getattr(thing, name)
            found[name] = arguments_of(member) if callable(member) else "property"
    return found


def arguments_of(thing: Any) -> list[str]:
    signature = inspect.signature(thing)
    values = list(signature.parameters.values())
    found = [readable(str(value)) for value in values]
    kinds = [value.kind for value in values]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        found.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    return [*found, f"-> {readable(str(signature.return_annotation))}"]


def default_of(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return readable(repr(field.default))
    return "factory" if field.default_factory is not dataclasses.MISSING else "required"


def readable(text: str) -> str:
    """Without the quotes of annotations, addresses in memory and the modules that a class lives in."""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return re.sub(r"qscope_posttrain\.[\w.]*\.(\w+)", r"\1", text).replace("'", "").replace('"', "")


def test_names_and_signatures_are_as_they_were():
    golden_file.compare("public_names", {name: describe(getattr(qp, name)) for name in sorted(NAMES)})


def test_type_checkers_read_the_same_names_as_python():
    """The imports under TYPE_CHECKING are what `_HOME` says."""
    tree = ast.parse(Path(qp.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imports == qp._HOME
    assert set(NAMES) == set(imports)
