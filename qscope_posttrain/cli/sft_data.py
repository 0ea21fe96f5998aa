"""Training data of `qscope sft`: its tokenizer, and rows packed with their languages where asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from qscope_posttrain.cli.inputs import load_tokenizer
from qscope_posttrain.cli.rows import Rows
from qscope_posttrain.cli.sft_arguments import Recipe
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import read_text
from qscope_posttrain.sft.packing import PackingStrategy, pack_with_languages


def data_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer with the end token and the chat template that SFTTrainer will give it before it reads the data.

    Raises:
        FileNotFoundError: no such model.
        ValueError: an end token outside the vocabulary, or a chat template that needs another model to be loaded.
    """
    training = recipe.training
    tokenizer = load_tokenizer(recipe.model_name, recipe.model.model_revision)
    if training.eos_token is not None:
        if training.eos_token not in tokenizer.get_vocab():
            raise UserValueError(f"eos_token '{training.eos_token}' is not in the vocabulary of '{recipe.model_name}'.")
        tokenizer.eos_token = training.eos_token
    if training.chat_template_path is not None:
        path = Path(training.chat_template_path)
        if not path.is_file():
            raise UserValueError(f"chat_template_path must be a template file here (.jinja), got '{path}'.")
        tokenizer.chat_template = read_text(path)
    if training.assistant_only_loss and tokenizer.chat_template is not None:
        # None where the template marks the assistant's turns already
        tokenizer.chat_template = get_training_chat_template(tokenizer) or tokenizer.chat_template
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
    return pack_with_languages(
        rows,
        data_tokenizer(recipe),
        max_length=training.max_length,
        strategy=cast(PackingStrategy, training.packing_strategy),
        language=recipe.penalty.language,
        languages=languages,
        completion_only_loss=training.completion_only_loss,
        assistant_only_loss=training.assistant_only_loss,
        dataset_text_field=training.dataset_text_field,
        shuffle_seed=training.seed,
    )


def without_packing(training: Any) -> Any:
    """The training arguments for rows that `pack` has made.

    Rows packed by "wrapped" are plain rows of one length; the other strategies mark where documents begin, which
    only the padding-free collator passes on.
    """
    return dataclasses.replace(
        training,
        packing=False,
        padding_free=training.packing_strategy != "wrapped",
        max_length=None,
        dataset_kwargs={**(training.dataset_kwargs or {}), "skip_prepare_dataset": True},
    )
