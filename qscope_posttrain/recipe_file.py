"""Recipes on disk: YAML that can hold values and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or not a mapping.
    """
    location = Path(path)
    if not location.is_file():
        raise UserFileNotFoundError(f"no recipe at '{location}'.")
    try:
        content = yaml.safe_load(location.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserValueError(f"{location} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserValueError(f"{location} must map keys to values, got {type(content).__name__}.")
    return content
