"""Training data of `qscope sft`: its tokenizer, and rows packed with their languages where asked."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from qscope_posttrain.cli.inputs import load_tokenizer
from qscope_posttrain.cli.rows import Rows
from qscope_posttrain.cli.sft_arguments import Recipe
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sft.packing import (
    Preparation,
    is_template_file,
    pack_with_languages,
    prepare_rows,
    training_tokenizer,
)


def data_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer with the end token and the chat template that SFTTrainer will give it before it reads the data.

    Raises:
        FileNotFoundError: no such model.
        ValueError: an end token outside the vocabulary.
    """
    tokenizer = load_tokenizer(recipe.model_name, recipe.model.model_revision)
    return training_tokenizer(tokenizer, Preparation.of(recipe.training))


def trainer_tokenizer(recipe: Recipe, training: Any) -> PreTrainedTokenizerBase:
    """The tokenizer for SFTTrainer. A template file is read here, and `training` does not name it any more."""
    tokenizer = load_tokenizer(recipe.model_name, recipe.model.model_revision)
    path = training.chat_template_path
    if path is not None and is_template_file(path):
        tokenizer = training_tokenizer(tokenizer, Preparation(chat_template_path=path))
        training.chat_template_path = None
    return tokenizer


def pack(recipe: Recipe, rows: Rows, languages: Collection[str]) -> Dataset:
    """Pack as `packing: true` asks for, keeping the language of every token, which TRL's own packing would drop.

    Afterwards the trainer has nothing left to prepare: see `without_packing`.

    Raises:
        ValueError: streamed data, no length to pack to, or data that cannot be packed.
    """
    _check_packing(recipe, rows)
    tokenizer = load_tokenizer(recipe.model_name, recipe.model.model_revision)
    return pack_with_languages(
        rows, tokenizer, args=recipe.training, language=recipe.penalty.language, languages=languages
    )


def prepare_evaluation(recipe: Recipe, rows: Rows) -> Dataset:
    """Evaluation data as SFTTrainer prepares them beside packed training data, packed or not (`eval_packing`)."""
    _check_packing(recipe, rows)
    training = recipe.training
    packing = training.packing if training.eval_packing is None else training.eval_packing
    tokenizer = load_tokenizer(recipe.model_name, recipe.model.model_revision)
    return prepare_rows(rows, tokenizer, Preparation.of(training), packing=packing)


def without_packing(training: Any) -> Any:
    """The training arguments for rows that `pack` has made.

    Rows packed by "wrapped" are plain rows of one length; the other strategies mark where documents begin, which
    only the padding-free collator passes on.
    """
    arguments = copy.copy(training)  # `replace` would check again what the arguments have set themselves
    arguments.packing = arguments.shuffle_dataset = False
    arguments.eval_packing = arguments.max_length = None
    arguments.padding_free = training.padding_free or training.packing_strategy != "wrapped"
    arguments.dataset_kwargs = {**(training.dataset_kwargs or {}), "skip_prepare_dataset": True}
    return arguments


def _check_packing(recipe: Recipe, rows: Rows) -> None:
    if isinstance(rows, IterableDataset):
        raise UserValueError("packing with languages needs the whole data set; set dataset_streaming: false.")
    if recipe.training.max_length is None:
        raise UserValueError("packing needs 'max_length', the number of tokens of a packed row.")
    given: Any = recipe.training.dataset_kwargs or {}
    if given.get("skip_prepare_dataset"):
        raise UserValueError(
            "packing prepares the data, and dataset_kwargs: {skip_prepare_dataset: true} says that they are prepared "
            "already; leave one of the two out."
        )
