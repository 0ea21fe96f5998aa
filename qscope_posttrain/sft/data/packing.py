"""Pack documents and keep the language of every token, which `SFTTrainer(packing=True)` drops."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

from datasets import Dataset

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.sft.data.language_ids import SCRIPT, LanguageRule, SampleLanguage
from qscope_posttrain.sft.data.preparation import Preparation, StandIn
from qscope_posttrain.sft.data.train_data import LANGUAGE_NAMES, TOKEN_LANGUAGES, languages_of
from qscope_posttrain.text.scripts import class_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PackingStrategy = Literal["bfd", "bfd_split", "wrapped"]


def pack_with_languages(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    strategy: PackingStrategy = "bfd",
    language: LanguageRule = "language",
    languages: Collection[str] = (),
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    dataset_text_field: str = "text",
    eos_token: str | None = None,
    chat_template_path: str | None = None,
    dataset_num_proc: int | None = None,
    shuffle_seed: int | None = None,
) -> Dataset:
    """Prepare a data set as `SFTTrainer(packing=True)` does, and keep the language of every token.

    TRL itself tokenizes, labels and packs, so that the rows are the ones it would train on. Train on the result with

        SFTConfig(packing=False, padding_free=True, max_length=None,
                  dataset_kwargs={"skip_prepare_dataset": True}, ...)

    With "bfd" and "bfd_split" the documents of a row stay apart (`seq_lengths`). With "wrapped" they are one running
    text without boundaries: use `padding_free=False`, and know that documents attend to each other.

    Args:
        dataset (Dataset): Any data set of text that `SFTTrainer` takes, with the columns that it reads (`tools`,
            `chat_template_kwargs`, ...). A `formatting_func` is applied before, with `dataset.map`.
        tokenizer (PreTrainedTokenizerBase): With a chat template where samples are conversations. It is not changed.
        max_length (int): Number of tokens of a packed row.
        strategy (str, default "bfd"): As in `trl.pack_dataset`. "bfd" cuts off what exceeds `max_length`, "bfd_split"
            packs it too.
        language (str or callable, default "language"): A column, "script", or a function of the example; see
            `SASFTConfig.language`.
        languages (collection of str, default ()): Those that "script" decides between; not needed otherwise.
        completion_only_loss (bool, default None): As in `SFTConfig`, like the next five. None: if there are prompts and
            completions.
        assistant_only_loss (bool, default False): Labels on assistant turns only.
        dataset_text_field (str, default "text"): The column of plain text.
        eos_token (str, default None): What a text or completion ends with; None is the tokenizer's own.
        chat_template_path (str, default None): A template file (.jinja, .j2), or a model that has one.
        dataset_num_proc (int, default None): Number of processes; each packs its own share of the rows.
        shuffle_seed (int, default None): Shuffle the rows before and after packing, as `shuffle_dataset` does with
            `seed`; None does not.

    Returns:
        A data set with `input_ids`, `labels`, `language_ids`, `language_names` and, unless wrapped, `seq_lengths`.

    Raises:
        ValueError: an empty data set, a sample that TRL cannot prepare, or a language that cannot be decided.
        TypeError: no `Dataset`.

    Example:
        >>> packed = qp.pack_with_languages(dataset, tokenizer, max_length=64)
        >>> packed.num_rows < dataset.num_rows, max(map(len, packed["input_ids"])) <= 64
        (True, True)
    """
    from trl import pack_dataset

    if not isinstance(dataset, Dataset):
        raise UserTypeError(
            f"Expected a datasets.Dataset, got {type(dataset).__name__}. A stream cannot be packed with languages: "
            "load the whole data set."
        )
    if len(dataset) == 0:
        raise UserValueError("The data set to pack is empty.")
    if language == "script" and not languages:
        raise UserValueError('language="script" needs languages=(...), the ones to decide between.')
    if strategy not in get_args(PackingStrategy):
        raise UserValueError(f"strategy must be one of {', '.join(get_args(PackingStrategy))}; got {strategy!r}.")
    if max_length < 1:
        raise UserValueError(f"max_length must be at least 1; got {max_length}.")
    if TOKEN_LANGUAGES in dataset.column_names:
        raise UserValueError("The data set is packed already; train on it with packing=False.")
    args = StandIn(
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
        dataset_text_field=dataset_text_field,
        eos_token=eos_token,
        chat_template_path=chat_template_path,
        dataset_num_proc=dataset_num_proc,
        max_length=None,
        shuffle_dataset=False,
    )
    prepare = Preparation(tokenizer, args, dataset[0])
    prepared = prepare(dataset)
    classes = class_names(dataset, language)
    decide = SampleLanguage(language, tuple(languages), decode=lambda ids: str(tokenizer.decode(ids)), classes=classes)
    of_sample = languages_of(_samples(dataset, prepared, language, dataset_text_field), decide, len(dataset))
    names = sorted(set(of_sample))

    def convert(example: dict[str, Any], index: int) -> dict[str, list[int]]:
        length = len(example["input_ids"])
        if len(example["labels"]) != length:
            raise UserValueError(f"Row {index} has {length} tokens but {len(example['labels'])} labels.")
        return {TOKEN_LANGUAGES: [names.index(of_sample[index])] * length}

    tokens = prepared.select_columns(["input_ids", "labels"])
    tokens = tokens.map(convert, with_indices=True, load_from_cache_file=False)
    if shuffle_seed is not None:
        tokens = tokens.shuffle(seed=shuffle_seed)
    packed = pack_dataset(tokens, max_length, strategy, {"num_proc": dataset_num_proc})
    if shuffle_seed is not None:
        packed = packed.shuffle(seed=shuffle_seed)
    # Constant over rows: it makes a row self-describing, whatever order of languages a FeatureSet has.
    return packed.map(lambda example: {LANGUAGE_NAMES: names}, load_from_cache_file=False)


def _samples(dataset: Dataset, prepared: Dataset, language: LanguageRule, text_field: str) -> Iterator[dict[str, Any]]:
    """The samples that decide the languages: the column, or all columns beside the tokens and labels that TRL made."""
    if isinstance(language, str) and language != SCRIPT and language in dataset.column_names:
        yield from dataset.select_columns(language)
        return
    # A column that TRL drops or renames while it prepares may still hold the language.
    for given, made in zip(dataset, prepared.select_columns(["input_ids", "labels"]), strict=True):
        yield {**given, **({"text": given[text_field]} if text_field in given else {}), **made}
