"""Training data of recipes: local files, folders and hub ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import trl
from datasets import Dataset, DatasetDict, IterableDataset

from qscope_posttrain.cli.training.recipe import TrainingRecipe, data_source
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import text_suffix
from qscope_posttrain.text.data_sets import READERS, check_data_file, read_data_set, read_file, reading, saved_data_set

Rows: TypeAlias = Dataset | IterableDataset

TRAINING_DATA = "training data"


def load_rows(recipe: TrainingRecipe, split: str) -> Rows:
    """Load one split of `dataset_name` (file, folder or hub id), or of TRL's list `datasets`.

    Raises:
        FileNotFoundError: a local file that does not exist.
        ValueError: no data set, two, or no such split.
    """
    mixture = recipe.mixture
    name = data_source(recipe.script.dataset_name, mixture.datasets)
    if name is not None:
        splits = _load_named(recipe, name)
    else:
        local = [_local(entry, mixture.streaming) for entry in mixture.datasets]
        with reading(", ".join(str(entry.path) for entry in mixture.datasets)):
            splits = trl.get_dataset(dataclasses.replace(mixture, datasets=local))
    if split not in splits:
        raise UserValueError(f"the data has no split '{split}'; it has {', '.join(map(str, splits))}.")
    return splits[split]


def load_evaluation(recipe: TrainingRecipe) -> Rows | None:
    """The evaluation split; None where the recipe does not evaluate."""
    if recipe.training.eval_strategy == "no":
        return None
    return load_rows(recipe, recipe.script.dataset_test_split)


def first_rows(rows: Rows, count: int) -> list[dict[str, Any]]:
    """Up to `count` rows from the start, of a data set in memory or a stream."""
    return list(islice(iter(rows), count))


def first_row(rows: Rows) -> Mapping[str, Any]:
    """The row by which TRL decides the kind of the data. ValueError: no rows."""
    found = first_rows(rows, 1)
    if not found:
        raise UserValueError("the training data has no rows.")
    return found[0]


def _load_named(recipe: TrainingRecipe, name: str) -> Any:
    saved = saved_data_set(name)
    if saved is not None:
        return saved if isinstance(saved, DatasetDict) else {recipe.script.dataset_train_split: saved}
    streaming = recipe.script.dataset_streaming
    if text_suffix(name) in READERS:
        return read_file(name, streaming=streaming, what=TRAINING_DATA)
    return read_data_set(name, name=recipe.script.dataset_config, streaming=streaming)


def _local(entry: Any, streaming: bool) -> Any:
    """An entry of `datasets` with checked data files; one whose path is a data file becomes its reader and the file."""
    given = entry.data_files or ()
    for file in [given] if isinstance(given, str) else given:
        if isinstance(file, str) and text_suffix(file) in READERS and Path(file).is_file():
            check_data_file(file, streaming, TRAINING_DATA)
    if text_suffix(entry.path) not in READERS or text_suffix(entry.path) == ".tsv":
        return entry
    place = check_data_file(entry.path, streaming, TRAINING_DATA)
    return dataclasses.replace(entry, path=READERS[text_suffix(place)], data_files=str(place))
