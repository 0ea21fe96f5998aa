"""Packing that keeps the language of every token.

`SFTTrainer(packing=True)` keeps only token ids and labels, so a packed row no longer says which documents it holds.
Here TRL prepares the rows as it does for the trainer, and what is added is the language of each token.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.sft.language_ids import LANGUAGE_NAMES, SCRIPT, TOKEN_LANGUAGES, LanguageRule, SampleLanguage
from qscope_posttrain.sft.train_data import languages_of
from qscope_posttrain.text.files import read_text
from qscope_posttrain.text.language_labels import class_names

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

PackingStrategy = Literal["bfd", "bfd_split", "wrapped"]
FormattingFunction = Callable[[Mapping[str, Any]], str]

_PREPARE_ARGUMENTS = ("self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The fields of `SFTConfig` that decide which tokens and labels a sample becomes, under TRL's names."""

    max_length: int | None = None
    """Tokens of a row; None keeps all. A packed row has exactly these, a row that is not packed at most"""
    truncation_mode: str = "keep_start"
    packing_strategy: PackingStrategy = "bfd"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    dataset_text_field: str = "text"
    dataset_num_proc: int | None = None
    eos_token: str | None = None
    chat_template_path: str | None = None
    shuffle_dataset: bool = False
    seed: int = 42

    @classmethod
    def of(cls, args: SFTConfig) -> Preparation:
        """Those of an `SFTConfig`."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def pack_with_languages(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    args: SFTConfig | None = None,
    max_length: int | None = None,
    strategy: PackingStrategy = "bfd",
    language: LanguageRule = "language",
    languages: Collection[str] = (),
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    dataset_text_field: str = "text",
    formatting_func: FormattingFunction | None = None,
    shuffle_seed: int | None = None,
) -> Dataset:
    """Tokenize and pack a data set as `SFTTrainer(packing=True)` does, with the language of every token.

    Train on the result with

        SFTConfig(packing=False, padding_free=True, max_length=None,
                  dataset_kwargs={"skip_prepare_dataset": True}, ...)

    With "bfd" and "bfd_split" the documents of a row stay apart (`seq_lengths`). With "wrapped" they are one running
    text without boundaries: use `padding_free=False`, and know that documents attend to each other.

    Args:
        dataset: samples of any type that `SFTTrainer` takes, except images.
        tokenizer: with a chat template where samples are conversations. It is not changed.
        args: the `SFTConfig` that would be given to the trainer; its values take the place of `max_length`, `strategy`,
            `completion_only_loss`, `assistant_only_loss`, `dataset_text_field` and `shuffle_seed`, and its `eos_token`,
            `chat_template_path` and `dataset_num_proc` count, too.
        max_length: tokens of a packed row.
        strategy: as in `trl.pack_dataset`. "bfd" cuts off what exceeds `max_length`, "bfd_split" packs it too.
        language: a column, "script", or a function of the example; see `SASFTConfig.language`.
        languages: the languages that "script" may decide between; not needed otherwise.
        completion_only_loss: labels on the completion only. None: if there are prompts and completions, as in TRL.
        assistant_only_loss: labels on assistant turns only.
        dataset_text_field: the column of plain text.
        formatting_func: as in `SFTTrainer`.
        shuffle_seed: shuffle before and after packing, as TRL does with `shuffle_dataset=True`.

    Returns:
        A data set with `input_ids`, `labels`, `language_ids`, `language_names` and, unless wrapped, `seq_lengths`.

    Raises:
        ValueError: an empty data set, a type of sample that is not supported, or a language that cannot be told.
        TypeError: `args` beside options that it holds, or a version of TRL that prepares data in another way.
    """
    from trl import pack_dataset

    given = Preparation(
        max_length=max_length,
        packing_strategy=strategy,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
        dataset_text_field=dataset_text_field,
        shuffle_dataset=shuffle_seed is not None,
        seed=Preparation.seed if shuffle_seed is None else shuffle_seed,
    )
    if args is not None and given != Preparation():
        twice = [field.name for field in fields(given) if getattr(given, field.name) != field.default]
        raise UserTypeError(f"{', '.join(twice)}: part of args as well; give it in one of the two places.")
    settings = given if args is None else Preparation.of(args)
    if settings.max_length is None:
        raise UserValueError("Packing needs max_length, the number of tokens of a packed row.")
    if language == SCRIPT and not languages:
        raise UserValueError('language="script" needs languages=(...), the ones to decide between.')
    rows = prepare_rows(dataset, tokenizer, replace(settings, max_length=None, shuffle_dataset=False), formatting_func)
    classes = class_names(dataset, language)
    decide = SampleLanguage(language, tuple(languages), decode=lambda ids: str(tokenizer.decode(ids)), classes=classes)
    column = isinstance(language, str) and language != SCRIPT and language in dataset.column_names
    samples = dataset.select_columns(language) if column else _Samples(dataset, rows, settings.dataset_text_field)
    of_sample = languages_of(samples, decide)
    names = sorted(set(of_sample))

    def languages_of_tokens(labels: list[list[int]], indices: list[int]) -> dict[str, list[list[int]]]:
        ids = [names.index(of_sample[index]) for index in indices]
        return {TOKEN_LANGUAGES: [[one] * len(tokens) for one, tokens in zip(ids, labels, strict=True)]}

    tokens = rows.select_columns(["input_ids", "labels"]).map(
        languages_of_tokens, input_columns="labels", with_indices=True, batched=True, load_from_cache_file=False
    )
    if settings.shuffle_dataset:
        tokens = tokens.shuffle(seed=settings.seed)
    packed = pack_dataset(tokens, settings.max_length, settings.packing_strategy)
    if settings.shuffle_dataset:
        packed = packed.shuffle(seed=settings.seed)
    # Constant over rows: it makes a row self-describing, whatever order of languages a FeatureSet has.
    return packed.map(lambda _: {LANGUAGE_NAMES: names}, load_from_cache_file=False)


def prepare_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: Preparation,
    formatting_func: FormattingFunction | None = None,
    packing: bool = False,
) -> Dataset:
    """Let TRL tokenize a data set, as `SFTTrainer` does at its construction, and nothing else of it.

    Returns:
        TRL's rows: `input_ids` and `labels` beside the columns that were there; packed rows have no others. With
        `max_length` they are truncated, and rows without a label are left out, where they are not packed.

    Raises:
        ValueError: an empty data set, images, or what TRL refuses.
        TypeError: a version of TRL that prepares data in another way.
    """
    from trl import SFTTrainer
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers
    from trl.data_utils import is_conversational

    prepare: Any = SFTTrainer._prepare_dataset
    if tuple(inspect.signature(prepare).parameters) != _PREPARE_ARGUMENTS:
        raise UserTypeError("This version of TRL prepares data in another way; install one that pyproject.toml names.")
    if len(dataset) == 0:
        raise UserValueError("The data set to prepare is empty.")
    sample = dataset[0]
    if "image" in sample or "images" in sample:
        raise UserValueError("Samples with images cannot be packed: TRL tokenizes them only when a batch is made.")
    if settings.assistant_only_loss and not is_conversational(sample) and "input_ids" not in sample:
        raise UserValueError(
            "assistant_only_loss=True needs conversations (messages, or prompt and completion of messages); the data "
            f"has the columns {', '.join(sample)}."
        )
    if not {"input_ids", "messages", "conversations", "prompt", settings.dataset_text_field} & {*sample} and (
        formatting_func is None
    ):
        raise UserValueError(
            f"Cannot tokenise samples with the columns {', '.join(sample)}; expected {settings.dataset_text_field!r}, "
            "'messages', 'conversations', 'prompt' and 'completion', or 'input_ids'."
        )
    tokenizer = training_tokenizer(tokenizer, settings)
    template = None
    if settings.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        template = get_training_chat_template(tokenizer)
    only = settings.completion_only_loss
    # The attributes that the trainer has set before it prepares its data.
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=template,
        completion_only_loss="prompt" in sample and "completion" in sample if only is None else only,
    )
    try:
        prepared: Dataset = prepare(trainer, dataset, tokenizer, settings, packing, formatting_func, "train")
    except RuntimeError as error:
        if "assistant_only_loss" not in str(error):
            raise
        raise UserValueError(
            "assistant_only_loss=True found a sample without assistant tokens. The chat template needs "
            "{% generation %} markers around assistant turns, and each conversation an assistant turn."
        ) from error
    return prepared


def training_tokenizer(tokenizer: PreTrainedTokenizerBase, settings: Preparation) -> PreTrainedTokenizerBase:
    """A tokenizer with the end token and chat template that `SFTTrainer` gives it before it reads the data: a copy.

    Raises:
        ValueError: an end token outside the vocabulary.
    """
    if settings.eos_token is None and settings.chat_template_path is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if settings.eos_token is not None:
        if settings.eos_token not in tokenizer.get_vocab():
            raise UserValueError(f"eos_token {settings.eos_token!r} is not in the vocabulary of the tokenizer.")
        tokenizer.eos_token = settings.eos_token
    if settings.chat_template_path is not None:
        if is_template_file(settings.chat_template_path):
            tokenizer.chat_template = read_text(settings.chat_template_path)
        else:
            tokenizer = _with_template_of(tokenizer, settings.chat_template_path)
    return tokenizer


def is_template_file(path: str) -> bool:
    """Whether TRL takes a `chat_template_path` for a file with a template, and not for a model that has one."""
    return Path(path).is_file() and path.endswith((".jinja", ".j2"))


def _with_template_of(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template, added tokens and end token of another model, as TRL takes them over."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import clone_chat_template

    # TRL resizes a model along with the tokenizer; this one stands in for it.
    config = Qwen2Config(
        vocab_size=len(tokenizer.vocab), hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        return clone_chat_template(Qwen2ForCausalLM(config), tokenizer, source)[1]


class _Samples:
    """Samples with their own columns and the tokens and labels that they became."""

    def __init__(self, dataset: Dataset, rows: Dataset, text_field: str) -> None:
        self._dataset, self._text_field = dataset, text_field
        self._tokens = rows.select_columns(["input_ids", "labels"])

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for sample, tokens in zip(self._dataset, self._tokens, strict=True):
            named = {"text": sample[self._text_field]} if self._text_field in sample else {}
            yield {**sample, **named, **tokens}
