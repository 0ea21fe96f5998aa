"""Training data of `qscope sft`: its tokenizer, and rows packed with their languages where asked."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, cast

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from qscope_posttrain.cli.inputs import load_tokenizer
from qscope_posttrain.cli.rows import Rows, first_rows
from qscope_posttrain.cli.sft_arguments import Recipe
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sft.packing import PackingStrategy, pack_with_languages
from qscope_posttrain.sft.preparation import Preparation, is_template_file, trained_tokenizer


def data_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer with the end token and the chat template that SFTTrainer will give it before it reads the data.

    Raises:
        FileNotFoundError: no such model.
        ValueError: an end token outside the vocabulary, or no such chat template.
    """
    tokenizer = load_tokenizer(recipe.model_name, recipe.model.model_revision)
    return trained_tokenizer(tokenizer, recipe.training.eos_token, recipe.training.chat_template_path)


def trainer_tokenizer(recipe: Recipe, training: Any) -> PreTrainedTokenizerBase:
    """The tokenizer for SFTTrainer. A template file is read here, and `training` does not name it any more."""
    tokenizer = load_tokenizer(recipe.model_name, recipe.model.model_revision)
    path = training.chat_template_path
    if path is not None and is_template_file(path):
        tokenizer = trained_tokenizer(tokenizer, None, path)
        training.chat_template_path = None
    return tokenizer


def pack(recipe: Recipe, rows: Rows, languages: Collection[str]) -> Dataset:
    """Pack as `packing: true` asks for, keeping the language of every token, which TRL's own packing would drop.

    Afterwards the trainer has nothing left to prepare: see `without_packing`.

    Raises:
        ValueError: streamed data, no length to pack to, or data that cannot be packed.
    """
    training = recipe.training
    if isinstance(rows, IterableDataset):
        raise UserValueError("packing with languages needs the whole data set; set dataset_streaming: false.")
    if training.max_length is None:
        raise UserValueError("packing needs 'max_length', the number of tokens of a packed row.")
    if skips_preparation(training):
        raise UserValueError(
            "packing and dataset_kwargs: {skip_prepare_dataset: true} exclude each other: rows that are not prepared "
            "are not packed. Remove one of them."
        )
    return pack_with_languages(
        rows,
        load_tokenizer(recipe.model_name, recipe.model.model_revision),
        max_length=training.max_length,
        strategy=cast(PackingStrategy, training.packing_strategy),
        language=recipe.penalty.language,
        languages=languages,
        completion_only_loss=training.completion_only_loss,
        assistant_only_loss=training.assistant_only_loss,
        dataset_text_field=training.dataset_text_field,
        eos_token=training.eos_token,
        chat_template_path=training.chat_template_path,
        dataset_num_proc=training.dataset_num_proc,
        shuffle_seed=training.seed if training.shuffle_dataset else None,
    )


def prepare_evaluation(recipe: Recipe, evaluation: Rows, train_rows: Rows) -> Rows:
    """The evaluation data as the trainer would prepare it beside `train_rows`; nothing there asks for languages."""
    training = recipe.training
    tokenizer = load_tokenizer(recipe.model_name, recipe.model.model_revision)
    prepare = Preparation(tokenizer, training, first_row(train_rows))
    packing = training.packing if training.eval_packing is None else training.eval_packing
    return prepare(evaluation, packing=bool(packing), name="eval")


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


def skips_preparation(training: Any) -> bool:
    """Whether the rows are said to be prepared already."""
    return bool((training.dataset_kwargs or {}).get("skip_prepare_dataset"))


def first_row(rows: Rows) -> Mapping[str, Any]:
    """The row by which TRL decides what kind of data it is.

    Raises:
        ValueError: no rows.
    """
    rows_found = first_rows(rows, 1)
    if not rows_found:
        raise UserValueError("the training data has no rows.")
    return rows_found[0]
