"""SASFT, token penalty and KL anchor in axolotl 0.21, as a plug-in of `axolotl train`.

    plugins:
      - qscope_posttrain.integrations.axolotl.SASFTPlugin
    qscope:
      method: sasft
      features: features.safetensors
      sasft_weight: 0.1
      sasft_language: language

`qscope:` holds the keys of a recipe of `qscope sft` that concern the loss. axolotl drops all columns when it
tokenizes, so the plug-in has each data set tokenized by `WithLanguage`, which calls the prompt strategy of the data
set's own `type` and keeps the column with the language. With `sasft_language: script` nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from qscope_posttrain.errors import UserFileNotFoundError, UserImportError, UserTypeError, UserValueError
from qscope_posttrain.sft.data.language_ids import SCRIPT, SampleLanguage
from qscope_posttrain.sft.data.train_data import LanguageCollator
from qscope_posttrain.sft.host import Host
from qscope_posttrain.sft.masks import PADDING_ID, TokenBatch
from qscope_posttrain.sft.settings import LossSettings

try:
    from axolotl.core.trainers import AxolotlTrainer
    from axolotl.integrations.base import BasePlugin
    from axolotl.prompt_strategies import load as load_strategy
    from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy
    from axolotl.prompt_tokenizers import PromptTokenizingStrategy
    from pydantic import BaseModel, model_validator
except ImportError as error:
    raise UserImportError(f"qscope_posttrain.integrations.axolotl needs axolotl 0.21: {error}.") from error

MODULE = "qscope_posttrain.integrations.axolotl"
PLUGIN = f"{MODULE}.SASFTPlugin"
BLOCK = "qscope"
_SPLIT = "it splits a sequence over ranks, so labels and languages no longer match the captured tokens"
_STREAM = "its batches are packed before the trainer sees them, and no language travels with them"
REFUSED = {
    "rl": "it trains by rewards or preferences, not on labeled responses",
    "reward_model": "it trains by preferences, not on labeled responses",
    "process_reward_model": "it trains by preferences, not on labeled responses",
    "orpo_alpha": "its loss is one of pairs, not of labeled responses",
    "sequence_parallel_degree": _SPLIT,
    "context_parallel_size": _SPLIT,
    "pretraining_dataset": _STREAM,
    "streaming": _STREAM,
    "balance_labels": "it accepts no collator but axolotl's own, and the languages come from one around it",
    "chunked_cross_entropy": "it replaces transformers' loss, whose divisor the penalty follows",
    "cut_cross_entropy": "it replaces the model's loss, and whether the penalty then has its divisor was never run",
}
"""Options of axolotl with which the loss does not work, and why"""


class SASFTArgs(BaseModel):
    """The block that the plug-in adds to axolotl's configuration, checked with it, before any data are prepared."""

    qscope: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_qscope(self) -> SASFTArgs:
        """Refuse a block that is missing, unknown keys, wrong values, and what the loss does not work with."""
        named = any(name.replace(":", ".") == PLUGIN for name in getattr(self, "plugins", None) or ())
        if self.qscope is None and not named:
            return self  # another training of a machine where the package is installed
        if self.qscope is None or not named:
            missing = f"plugins: [{PLUGIN}]" if self.qscope is not None else f"a block `{BLOCK}:` with the loss"
            raise UserValueError(f"{BLOCK}: this configuration lacks {missing}; it needs both, or neither.")
        read_settings(self.qscope)
        for option, why in REFUSED.items():
            value = getattr(self, option, None)
            splits_nothing = value == 1 and option in ("sequence_parallel_degree", "context_parallel_size")
            if value and not splits_nothing:
                raise UserValueError(f"{BLOCK}: the loss does not work with `{option}: {value}`: {why}.")
        return self


def read_settings(block: Mapping[str, Any]) -> LossSettings:
    """The settings in the block `qscope:`."""
    return LossSettings.read(dict(block), BLOCK)


class SASFTPlugin(BasePlugin):
    """The plug-in that axolotl loads; see the module."""

    def get_input_args(self) -> str:
        return f"{MODULE}.{SASFTArgs.__name__}"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Have axolotl, which calls this before it prepares the data itself, keep the column with the language."""
        if cfg.qscope is None:
            return
        settings = read_settings(cfg.qscope)
        if settings.features is not None and not preprocess and not Path(settings.features).is_file():
            raise UserFileNotFoundError(f"{BLOCK}: there is no features file {settings.features}.")
        if (column := language_column(settings)) is not None:
            keep_column(cfg.datasets, column)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Keep the language column from evaluation, whose packed batches would else contain it."""
        column = None if cfg.qscope is None else language_column(read_settings(cfg.qscope))
        if column is not None and getattr(trainer, "eval_data_collator", None) is not None:
            trainer.eval_data_collator = WithoutColumn(trainer.eval_data_collator, column)
        return []

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach the loss; only a training gets here."""
        if cfg.qscope is not None:
            read_settings(cfg.qscope).callback().attach(trainer, host=AxolotlHost)


class AxolotlHost(Host):
    """axolotl's trainer for supervised fine-tuning, whose packed rows come as lists of documents."""

    def check(self) -> None:
        kind, name = type(self.trainer), type(self.callback).__name__
        other = kind.__module__.startswith("axolotl.") and kind is not AxolotlTrainer
        if other or not isinstance(self.trainer, AxolotlTrainer):
            raise UserTypeError(
                f"{name} works with AxolotlTrainer, axolotl's trainer for supervised fine-tuning, and your own "
                f"subclasses of it; this configuration makes a {kind.__module__}.{kind.__name__}."
            )
        super().check()

    @property
    def packed(self) -> bool:
        return bool(self.trainer.args.sample_packing)

    def columns(self) -> tuple[str, ...]:
        try:
            return super().columns()
        except UserValueError as error:
            raise UserValueError(
                f"{error} (A data set of axolotl that was tokenized before must have it beside the tokens.)"
            ) from error

    def _collator(self, decide: SampleLanguage, key: str, columns: Iterable[str]) -> LanguageCollator:
        if not self.packed:
            return super()._collator(decide, key, columns)
        # axolotl removes no columns from packed rows, so that its own collator would get them.
        drop = () if self.by_documents else columns
        return PackedCollator(self.trainer.data_collator, decide, key, drop, self.by_documents)

    def token_batch(self, inputs: MutableMapping[str, Any], decide: SampleLanguage | None, key: str) -> TokenBatch:
        if self.packed and "position_ids" not in inputs:
            raise UserValueError(
                f"A packed batch has no position ids (its keys: {', '.join(inputs)}), so nobody can tell where its "
                "documents start. Train with sample_packing: false."
            )
        return super().token_batch(inputs, decide, key)


class PackedCollator(LanguageCollator):
    """Languages for axolotl's multipack, whose collator gets one list of documents per row, and joins them."""

    def __getattr__(self, name: str) -> Any:
        """axolotl asks its collator for `tokenizer` and `pad_to_multiple_of`."""
        if name == "inner":  # not there yet: the object is being read from a pickle
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, examples: list[Any]) -> Any:
        if self.documents:
            return super().__call__(examples)
        rows = examples if isinstance(examples[0], list) else [examples]
        kept: Any = [[{k: v for k, v in row.items() if k not in self.drop} for row in several] for several in rows]
        batch = self.inner(kept)
        ids = torch.full_like(batch["input_ids"], PADDING_ID)
        for place, documents in enumerate(rows):
            tokens = torch.as_tensor([token for document in documents for token in document["input_ids"]])
            if not torch.equal(batch["input_ids"][place, : len(tokens)], tokens):
                raise UserValueError("A packed row is not its documents one after another, and padding behind them.")
            ids[place, : len(tokens)] = torch.cat([self._token_ids(document) for document in documents])
        batch[self.key] = ids
        return batch


class WithoutColumn:
    """A collator that does not see a column, in samples or in packed rows of them."""

    def __init__(self, inner: Callable[[list[Any]], Any], column: str) -> None:
        self.inner = inner
        self.column = column

    def __call__(self, examples: list[Any]) -> Any:
        return self.inner([self._without(example) for example in examples])

    def _without(self, example: Any) -> Any:
        if isinstance(example, list):
            return [self._without(document) for document in example]
        return {name: value for name, value in example.items() if name != self.column}


# Languages of samples


def language_column(settings: LossSettings) -> str | None:
    """The column that tells the languages; None where the tokens do, or none is read."""
    rule = settings.config.language if settings.config.target is not None else SCRIPT
    return None if rule == SCRIPT else str(rule)


def keep_column(datasets: Iterable[Any], column: str) -> None:
    """Have axolotl tokenize data sets by `load` of this module."""
    for dataset in datasets:
        if dataset.type is None:  # tokenized already: it keeps its columns
            continue
        if not isinstance(dataset.type, str):
            raise UserValueError(
                f"{BLOCK}: the data set {dataset.path} has a type written out, with which axolotl drops the column "
                f"{column!r}. Use `type: chat_template` or another by name, or {SCRIPT!r} as the option language."
            )
        dataset.qscope_type, dataset.type = dataset.type, MODULE
        # No other use than that it enters the name of the cache, which must not mix up types and columns.
        dataset.input_format = f"{dataset.qscope_type} with {column}"


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None, processor: Any = None) -> Any:
    """The prompt strategy of a data set whose type `keep_column` has replaced; axolotl calls it."""
    inner = load_strategy(ds_cfg.qscope_type, tokenizer, cfg, ds_cfg, processor=processor)
    one_by_one = isinstance(inner, PromptTokenizingStrategy) and not inner.supports_batched
    if not one_by_one and not isinstance(inner, ChatTemplateStrategy):
        raise UserValueError(
            f"{BLOCK}: axolotl tokenizes data of type {ds_cfg.qscope_type!r} without a prompt strategy that makes one "
            f"sample of each, so the column with the language is lost. Use `type: chat_template`, or {SCRIPT!r} as the "
            "option language."
        )
    return WithLanguage(inner, str(language_column(read_settings(cfg.qscope))))


class WithLanguage(PromptTokenizingStrategy):
    """Another strategy, whose samples keep the column with their language."""

    supports_batched = False  # so that a sample that the other strategy drops takes its language with it

    def __init__(self, inner: Any, column: str) -> None:
        self.inner = inner
        self.column = column
        self.filter_rows = inner.filter_rows

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        if self.column not in prompt:
            raise UserValueError(
                f"{BLOCK}: the data have no column {self.column!r} with the language of a sample; they have "
                f"{', '.join(prompt)}. Name another one as the option language, or take {SCRIPT!r}."
            )
        found = dict(self.inner.tokenize_prompt({k: v for k, v in prompt.items() if k != self.column}))
        return {**found, self.column: prompt[self.column]} if found else {}
