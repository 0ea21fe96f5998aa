"""Training data of recipes: local files, folders and hub ids."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import trl
from datasets import Dataset, IterableDataset, load_from_disk

from qscope_posttrain.cli.dataset_loading import read_dataset
from qscope_posttrain.cli.recipe import TrainingRecipe
from qscope_posttrain.errors import UserFileNotFoundError, UserValueError

Rows: TypeAlias = Dataset | IterableDataset

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(recipe: TrainingRecipe, split: str) -> Rows:
    """The rows of one split: `dataset_name` (file, folder or hub id), or TRL's list `datasets`.

    Raises:
        FileNotFoundError: a local file that does not exist.
        ValueError: no data set, two, or no such split.
    """
    name, mixture = recipe.script.dataset_name, recipe.mixture
    if bool(name) == bool(mixture.datasets):
        both = "both" if name else "neither"
        raise UserValueError(f"give the training data as 'dataset_name' or as 'datasets'; the recipe has {both}.")
    if name:
        splits = _load_named(recipe, name)
    else:
        local = [_local(entry) for entry in mixture.datasets]
        splits = trl.get_dataset(dataclasses.replace(mixture, datasets=local))
    if split not in splits:
        raise UserValueError(f"the data has no split '{split}'; it has {', '.join(map(str, splits))}.")
    return splits[split]


def first_rows(rows: Rows, count: int) -> list[dict[str, Any]]:
    """Up to `count` rows from the start, of a data set in memory or a stream."""
    return list(islice(iter(rows), count))


def _load_named(recipe: TrainingRecipe, name: str) -> Any:
    path = Path(name)
    if (path / "dataset_dict.json").is_file():
        return load_from_disk(name)
    if (path / "state.json").is_file():
        return {recipe.script.dataset_train_split: load_from_disk(name)}
    streaming = recipe.script.dataset_streaming
    if path.suffix in _READERS:
        return read_dataset(_READERS[path.suffix], data_files=str(_existing(path)), streaming=streaming)
    return read_dataset(name, name=recipe.script.dataset_config, streaming=streaming)


def _local(entry: Any) -> Any:
    """An entry of `datasets` whose path is a data file, as the reader and its file."""
    path = Path(entry.path)
    if path.suffix not in _READERS:
        return entry
    return dataclasses.replace(entry, path=_READERS[path.suffix], data_files=str(_existing(path)))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserFileNotFoundError(f"no training data at '{path}'.")
    return path
