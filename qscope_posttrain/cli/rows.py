"""Training data of recipes: local files, folders and hub ids."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import trl
from datasets import Dataset, DatasetDict, IterableDataset

from qscope_posttrain.cli.recipe import TrainingRecipe
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import text_suffix
from qscope_posttrain.text.data_sets import READERS, check_data_file, read_data_set, read_file, reading, saved_data_set

Rows: TypeAlias = Dataset | IterableDataset

TRAINING_DATA = "training data"


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
        local = [_local(entry, mixture.streaming) for entry in mixture.datasets]
        with reading(", ".join(str(entry.path) for entry in mixture.datasets)):
            splits = trl.get_dataset(dataclasses.replace(mixture, datasets=local))
    if split not in splits:
        raise UserValueError(f"the data has no split '{split}'; it has {', '.join(map(str, splits))}.")
    return splits[split]


def first_rows(rows: Rows, count: int) -> list[dict[str, Any]]:
    """Up to `count` rows from the start, of a data set in memory or a stream."""
    return list(islice(iter(rows), count))


def _load_named(recipe: TrainingRecipe, name: str) -> Any:
    saved = saved_data_set(name)
    if saved is not None:
        return saved if isinstance(saved, DatasetDict) else {recipe.script.dataset_train_split: saved}
    streaming = recipe.script.dataset_streaming
    if text_suffix(name) in READERS:
        return read_file(name, streaming=streaming, what=TRAINING_DATA)
    return read_data_set(name, name=recipe.script.dataset_config, streaming=streaming)


def _local(entry: Any, streaming: bool) -> Any:
    """An entry of `datasets` whose path is a data file, as the reader and its file; its data files are looked at."""
    given = entry.data_files or ()
    for file in [given] if isinstance(given, str) else given:
        if isinstance(file, str) and text_suffix(file) in READERS and Path(file).is_file():
            check_data_file(file, streaming, TRAINING_DATA)
    if text_suffix(entry.path) not in READERS or text_suffix(entry.path) == ".tsv":
        return entry
    place = check_data_file(entry.path, streaming, TRAINING_DATA)
    return dataclasses.replace(entry, path=READERS[text_suffix(place)], data_files=str(place))
