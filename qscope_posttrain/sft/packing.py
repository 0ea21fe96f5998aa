"""Packing that keeps the language of every token.

`SFTTrainer(packing=True)` keeps only token ids and labels, so a packed row no longer says which documents it holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sft.language_ids import LANGUAGE_NAMES, TOKEN_LANGUAGES, LanguageRule, SampleLanguage
from qscope_posttrain.sft.masks import IGNORED_LABEL
from qscope_posttrain.sft.train_data import languages_of
from qscope_posttrain.text.language_labels import class_names

if TYPE_CHECKING:
    from datasets import Dataset
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
    shuffle_seed: int | None = None,
) -> Dataset:
    """Tokenise a data set as `SFTTrainer` does and pack it with the language of every token.

    Train on the result with

        SFTConfig(packing=False, padding_free=True, max_length=None,
                  dataset_kwargs={"skip_prepare_dataset": True}, ...)

    With "bfd" and "bfd_split" the documents of a row stay apart (`seq_lengths`). With "wrapped" they are one running
    text without boundaries: use `padding_free=False`, and know that documents attend to each other.

    Args:
        dataset: text, messages, prompt and completion (plain or conversational), or `input_ids` with `labels`.
        tokenizer: with a chat template where samples are conversations.
        max_length: tokens of a packed row.
        strategy: as in `trl.pack_dataset`. "bfd" cuts off what exceeds `max_length`, "bfd_split" packs it too.
        language: a column, "script", or a function of the example; see `SASFTConfig.language`.
        languages: what "script" may decide between; not needed otherwise.
        completion_only_loss: labels on the completion only. None: if there are prompts and completions, as in TRL.
        assistant_only_loss: labels on assistant turns only, for a chat template with generation markers.
        dataset_text_field: the column of plain text.
        shuffle_seed: shuffle before packing.

    Returns:
        A data set with `input_ids`, `labels`, `language_ids`, `language_names` and, unless wrapped, `seq_lengths`.

    Raises:
        ValueError: an empty data set, a type of sample that is not supported, or a language that cannot be told.
    """
    from trl import pack_dataset

    if len(dataset) == 0:
        raise UserValueError("The data set to pack is empty.")
    if language == "script" and not languages:
        raise UserValueError('language="script" needs languages=(...), the ones to decide between.')
    tokenise = _Tokeniser(tokenizer, completion_only_loss, assistant_only_loss, dataset_text_field)
    classes = class_names(dataset, language)
    decide = SampleLanguage(language, tuple(languages), decode=lambda ids: str(tokenizer.decode(ids)), classes=classes)
    of_sample = languages_of(dataset, decide)
    names = sorted(set(of_sample))

    def convert(example: dict[str, Any], index: int) -> dict[str, list[int]]:
        input_ids, labels = tokenise(example)
        token_languages = [names.index(of_sample[index])] * len(input_ids)
        return {"input_ids": input_ids, "labels": labels, TOKEN_LANGUAGES: token_languages}

    tokens = dataset.map(convert, with_indices=True, remove_columns=dataset.column_names, load_from_cache_file=False)
    if shuffle_seed is not None:
        tokens = tokens.shuffle(seed=shuffle_seed).flatten_indices()
    packed = pack_dataset(tokens, max_length, strategy)
    # Constant over rows: it makes a row self-describing, whatever order of languages a FeatureSet has.
    return packed.map(lambda example: {LANGUAGE_NAMES: names}, load_from_cache_file=False)


class _Tokeniser:
    """From one sample to token ids and labels, by the rules of TRL's data set preparation."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        completion_only_loss: bool | None,
        assistant_only_loss: bool,
        dataset_text_field: str,
    ) -> None:
        self.tokenizer = tokenizer
        self.completion_only_loss = completion_only_loss
        self.assistant_only_loss = assistant_only_loss
        self.text_field = dataset_text_field

    def __call__(self, example: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        if "input_ids" in example:
            input_ids = list(example["input_ids"])
            return input_ids, list(example.get("labels", input_ids))
        if "prompt" in example and "completion" in example:
            return self._prompt_completion(example)
        if isinstance(example.get("messages"), list):
            return self._chat(example["messages"])
        if isinstance(example.get(self.text_field), str):
            input_ids = self._plain(self._with_eos(example[self.text_field]))
            return input_ids, list(input_ids)
        raise UserValueError(
            f"Cannot tokenise a sample with the columns {', '.join(example)}; expected {self.text_field!r}, "
            "'messages', 'prompt' and 'completion', or 'input_ids'."
        )

    def _prompt_completion(self, example: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        prompt, completion = example["prompt"], example["completion"]
        if isinstance(prompt, list):
            prompt_ids = self._template(prompt, add_generation_prompt=True)["input_ids"]
            input_ids, labels = self._chat(prompt + completion)
        else:
            prompt_ids = self._plain(prompt)
            input_ids = self._plain(prompt + self._with_eos(completion))
            labels = list(input_ids)
        if self.completion_only_loss is not False:
            # Tokens may merge across the boundary: the completion starts where the two tokenisations part.
            pairs = enumerate(zip(prompt_ids, input_ids, strict=False))
            start = next((i for i, (a, b) in pairs if a != b), min(len(prompt_ids), len(input_ids)))
            labels[:start] = [IGNORED_LABEL] * start
        return input_ids, labels

    def _chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        if not self.assistant_only_loss:
            input_ids = list(self._template(messages)["input_ids"])
            return input_ids, list(input_ids)
        encoded = self._template(messages, return_assistant_tokens_mask=True)
        input_ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
        if 1 not in mask:
            raise UserValueError(
                "assistant_only_loss=True found no assistant token. The chat template needs {% generation %} markers "
                "around assistant turns; trl.get_training_chat_template adds them for known templates."
            )
        return input_ids, [token if flag else IGNORED_LABEL for token, flag in zip(input_ids, mask, strict=True)]

    def _template(self, messages: list[dict[str, Any]], **options: Any) -> Mapping[str, Any]:
        encoded: Any = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        return encoded

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _with_eos(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        return text if eos is None or text.endswith(eos) else text + eos
