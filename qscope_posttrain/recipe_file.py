"""Recipes on disk: YAML that can hold values and nothing else."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError


class _Loader(yaml.SafeLoader):
    """Numbers as YAML 1.2 reads them: 1e-5 is one; 1:30, 010 and 2026-01-01 are text."""


class _WrittenLoader(yaml.BaseLoader):
    """Every plain value as the text that stands in the file."""


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
    """A YAML file that holds a mapping.

    Args:
        as_written: Leave every plain value as the text that stands in the file, `no` and `007` for example.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or not a mapping.
    """
    location = Path(path)
    if not location.is_file():
        raise UserFileNotFoundError(f"no recipe at '{location}'.")
    try:
        content = yaml.load(location.read_text(encoding="utf-8"), _WrittenLoader if as_written else _Loader)
    except yaml.YAMLError as error:
        raise UserValueError(f"{location} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserValueError(f"{location} must map keys to values, got {type(content).__name__}.")
    return content
