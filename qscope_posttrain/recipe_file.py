"""Read recipes: YAML that can hold values and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import check_is_file, read_text

MAX_BYTES = 1 << 18
_MAX_NODES = 100_000  # Keys and values, aliases written out: a few lines of aliases of aliases can stand for gigabytes


class _Loader(yaml.SafeLoader):
    """Numbers as YAML 1.2 reads them: 1e-5 is one; 1:30, 010 and 2026-01-01 are text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in found if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def read_yaml(path: str | os.PathLike[str], as_written: bool = False) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; `as_written` keeps every plain value (`no`, `007`) as text. ValueError for
    what is not text, not YAML, not a mapping, has a key twice, or is far too large for a recipe."""
    size = check_is_file(path, "recipe").stat().st_size
    if size > MAX_BYTES:
        raise UserValueError(f"'{path}' has {size} bytes; a recipe has a few thousand, at most {MAX_BYTES}.")
    text = read_text(path)
    loader: Any = None
    try:
        loader = (yaml.BaseLoader if as_written else _Loader)(text)
        node = loader.get_single_node()
        _size(node, str(path), {})
        content = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserValueError(f"{path} is not valid YAML: {error}") from error
    except RecursionError:
        raise UserValueError(f"{path} is not YAML that can be read: it is nested too deeply.") from None
    except UserValueError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # The library lets through what a value of a wrong form raises: a day 32, a number of 5000 digits, "!!int ''".
        raise UserValueError(f"{path} is not valid YAML: a value cannot be read ({error}).") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(content, dict):
        raise UserValueError(f"{path} must map keys to values, got {type(content).__name__}.")
    return content


def as_text(value: Any) -> Any:
    """A plain value in YAML's words; lists item by item, mappings as they are."""
    if isinstance(value, list):
        return [as_text(item) for item in value]
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if value is None or isinstance(value, Mapping) else str(value)


def _size(node: yaml.Node | None, path: str, known: dict[int, int]) -> int:
    """Count `node` and those below it as often as they are referred to. ValueError for too many, for a node that holds
    itself, and for a key given twice, of which YAML readers silently keep the last."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _MAX_NODES + 1  # until it is counted: whoever meets it meanwhile is a part of it
    size = 1
    seen: set[tuple[str, str]] = set()
    for entry in node.value:
        key, value = entry if isinstance(node, yaml.MappingNode) else (None, entry)
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise UserValueError(f"{path}, line {key.start_mark.line + 1}: the key '{key.value}' is given twice.")
            seen.add((key.tag, key.value))
        size += _size(key, path, known) + _size(value, path, known)
        if size > _MAX_NODES:
            raise UserValueError(f"{path} is no recipe: its aliases stand for more than {_MAX_NODES} values.")
    known[id(node)] = size
    return size
