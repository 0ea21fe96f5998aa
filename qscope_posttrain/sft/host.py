"""Differences between trainers: one `Host` for each kind of trainer that an auxiliary loss attaches to."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.models.layers import pretrained_model
from qscope_posttrain.sft.data.language_ids import NO_LANGUAGE, SCRIPT, SampleLanguage
from qscope_posttrain.sft.data.train_data import (
    LANGUAGE_NAMES,
    TOKEN_LANGUAGES,
    LanguageCollator,
    count_languages,
    each_row,
    languages_of_documents,
    without_effect,
)
from qscope_posttrain.sft.masks import TokenBatch
from qscope_posttrain.text.scripts import class_names

if TYPE_CHECKING:
    from qscope_posttrain.sft.attachment import AuxiliaryLossCallback

INTEGRATIONS = {"swift": "ms-swift", "axolotl": "axolotl"}
"""Packages whose trainers need a host of their own, from the module of `qscope_posttrain.integrations` of that name"""


@dataclass(frozen=True, eq=False)
class Host:
    """A `transformers.Trainer` of a causal language model; a subclass says what differs in another kind of trainer.

    A host belongs to one callback on one trainer. Its class is found by `host_class`, or given to
    `callback.attach(trainer, host=...)`. It is asked in this order:

        check             at attach, before anything is changed: refuse by name what cannot work
        sample_language   at attach, and before a training on other data: check the data's languages
        train_dataloader  in place of the trainer's own: its batches bring the language of every token
        token_batch       for every micro-batch as the data loader gives it, hence before the trainer cuts its labels

    Everything else is the same in all of them: the term is added to what `compute_loss` returns, its divisor follows
    the trainer's (`loss.Normalizer`), and metrics are added to the next `trainer.log` of a training.
    """

    trainer: Any
    callback: AuxiliaryLossCallback

    def check(self) -> None:
        """Refuse trainers whose loss or batches are not what the terms rely on."""
        trainer, name = self.trainer, type(self.callback).__name__
        parallelism = trainer.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_size > 1 or parallelism.sp_size > 1):
            raise UserValueError(
                f"{name} does not work with context or sequence parallelism (cp_size={parallelism.cp_size}, "
                f"sp_size={parallelism.sp_size}): they split a sequence over ranks inside the training step, so labels "
                "and languages no longer match the captured tokens. Use data parallelism, FSDP2 or ZeRO instead."
            )
        if trainer.args.n_gpu > 1:
            raise UserValueError(
                f"{name} does not work with nn.DataParallel, whose replicas run in threads of one process. "
                "Launch with `accelerate launch` or torchrun, or make one GPU visible."
            )
        if trainer.model_init is not None:
            raise UserValueError(
                f"{name} belongs to one model, and a trainer with model_init=... makes a new one at every train(), as "
                "in a hyperparameter search. Give the trainer model=..., and each trial a trainer of its own."
            )
        model: Any = pretrained_model(trainer.model)
        loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "", ForCausalLMLoss)
        if loss is not ForCausalLMLoss or getattr(model.config, "is_encoder_decoder", False):
            raise UserValueError(
                f"{name} needs a causal language model, whose labels are its input tokens; got {type(model).__name__}."
            )
        several = trainer.args.gradient_accumulation_steps > 1 or trainer.args.world_size > 1
        by_window = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
        if trainer.label_smoother is not None and several and not by_window:
            raise UserValueError(
                "label_smoothing_factor: before transformers 5.15 the trainer adds up smoothed means of micro-batches, "
                f"so that the weight of {name} would depend on accumulation and ranks. Use transformers 5.15, or none."
            )

    def columns(self) -> tuple[str, ...]:
        """The columns of the data that decide languages, which its collator never sees; they must be there."""
        rule, columns = self.callback.config.language, column_names(self.trainer)
        if columns is not None and TOKEN_LANGUAGES in columns:
            return TOKEN_LANGUAGES, LANGUAGE_NAMES
        if self.by_documents:
            return ()
        if callable(rule) and columns is None and self.trainer.args.remove_unused_columns:
            raise UserValueError(
                "The training data does not say which columns it has, so the trainer would remove all that a function "
                "of the example may read. Set remove_unused_columns=False, or name a column."
            )
        if callable(rule) or rule == SCRIPT:
            # Which columns a function reads is unknown: it gets them all.
            return tuple(columns or ())
        if columns is not None and rule not in columns:
            raise UserValueError(
                f"The training data has no column {rule!r} with a sample's language; it has {', '.join(columns)}. "
                'Name another column, or pass language="script" or a function of the example.'
            )
        return (rule,)

    def sample_language(self) -> SampleLanguage | None:
        """The rule that tells languages, after it has read every row in memory; None where no language is read.

        A row that is in no known language is an error, and a warning says if no row is in one that the loss acts on.
        """
        if not self.callback.reads_languages:
            return None
        config, data, columns = self.callback.config, self.trainer.train_dataset, self.columns()
        tools, names = self.trainer.processing_class, class_names(data, config.language)
        if tools is None and config.language == SCRIPT:
            raise UserValueError(
                'language="script" reads the text of labeled tokens, and the trainer has no tokenizer: give it one as '
                "processing_class=..., or name a column with the language."
            )
        decide = SampleLanguage(
            config.language, self.callback.languages, config.ignore_languages, getattr(tools, "decode", None), names
        )
        if isinstance(data, Dataset | list | tuple):  # others are read batch by batch, as they come
            counts = self._count(data, columns, decide)
            if nothing := without_effect(counts, str(config.target), config.ignore_languages):
                warnings.warn(nothing, stacklevel=2)
        return decide

    @property
    def by_documents(self) -> bool:
        """Whether the labeled tokens of each document in a batch tell its language, whatever the samples hold."""
        return self.callback.config.language == SCRIPT and TOKEN_LANGUAGES not in (column_names(self.trainer) or ())

    def _count(self, data: Dataset | Sequence[Any], columns: tuple[str, ...], decide: SampleLanguage) -> Counter[str]:
        if not self.by_documents and (decide.rule != SCRIPT or {TOKEN_LANGUAGES, "labels"}.intersection(columns)):
            return count_languages(data, decide)
        # Only the collator knows which tokens carry the loss.
        collator = self._collator(decide, SCRIPT, column_names(self.trainer) or dict(*data[:1]))
        counts: Counter[str] = Counter()
        for found in each_row(data, lambda row: collator([dict(row)])[SCRIPT].unique().tolist()):
            counts.update([decide.languages[place] for place in found if place >= 0] or [NO_LANGUAGE])
        return counts

    def train_dataloader(self, build: Callable[..., Any], decide: SampleLanguage, key: str) -> Any:
        """Call `build()`, the trainer's `get_train_dataloader`, while its collator adds `batch[key]`.

        The collator is wrapped and the columns are kept for this one dataloader; evaluation never sees either.
        """
        trainer, columns, collator = self.trainer, self.columns(), self.trainer.data_collator
        trainer._set_signature_columns_if_needed()
        trainer.data_collator = self._collator(decide, key, columns)
        signature = list(trainer._signature_columns)
        trainer._signature_columns = signature + [column for column in columns if column not in signature]
        try:
            return build()
        finally:
            trainer.data_collator, trainer._signature_columns = collator, signature

    def _collator(self, decide: SampleLanguage, key: str, columns: Iterable[str]) -> LanguageCollator:
        """The trainer's collator with languages, which keeps those of `columns` from it that the trainer removes."""
        self.trainer._set_signature_columns_if_needed()
        extra = set(columns).difference(self.trainer._signature_columns)
        drop = extra if self.trainer.args.remove_unused_columns else ()
        return LanguageCollator(self.trainer.data_collator, decide, key, drop, self.by_documents)

    def token_batch(self, inputs: MutableMapping[str, Any], decide: SampleLanguage | None, key: str) -> TokenBatch:
        """Labels, languages and documents of a micro-batch, whose own entries stay as they are."""
        batch = TokenBatch.from_inputs(inputs, None if decide is None else self.language_ids(inputs, decide, key))
        shifted = inputs.get("shift_labels")
        if shifted is not None and not torch.equal(shifted, batch.next_labels()):
            raise UserValueError(
                "The batch's 'shift_labels', from which the cross-entropy comes, are not its 'labels' shifted left by "
                "one, with -100 at the end. Let the collator return labels alone."
            )
        return batch

    def model_inputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a batch for `compute_loss`, beside its labels, that the starting model of an anchor reads."""
        return inputs

    def language_ids(self, inputs: MutableMapping[str, Any], decide: SampleLanguage, key: str) -> Tensor:
        """`[batch, tokens]`: the index of each token's language in `decide.languages`, or -1."""
        if key not in inputs and not self.by_documents:
            raise UserValueError(
                f"The batch has no {key!r} (its keys: {', '.join(inputs)}): it does not come from the trainer's "
                f"get_train_dataloader() with {type(self.callback).__name__} attached."
            )
        found: Tensor = inputs[key] if key in inputs else languages_of_documents(inputs, decide)
        return found


class TRLHost(Host):
    """A `trl.SFTTrainer`, whose data may still have the texts beside the tokens."""

    by_documents = False

    def columns(self) -> tuple[str, ...]:
        if self.trainer.args.packing and TOKEN_LANGUAGES not in (column_names(self.trainer) or ()):
            raise UserValueError(
                "SFTTrainer(packing=True) keeps only token ids and labels, so a packed row no longer holds the "
                "language of its documents. Pack with qscope_posttrain.pack_with_languages(dataset, tokenizer, "
                "max_length=...) and train with packing=False, padding_free=True, max_length=None, "
                'dataset_kwargs={"skip_prepare_dataset": True}.'
            )
        return super().columns()


def column_names(trainer: Any) -> list[str] | None:
    """The columns of a trainer's training data; None for a stream that does not know them."""
    return getattr(trainer.train_dataset, "column_names", None)


def host_class(trainer: object, name: str) -> type[Host]:
    """The kind of a trainer, by its classes, without an import of their packages; `name` is the callback's.

    TypeError for one of another kind of training, and for one that an integration attaches to.
    """
    classes = [(kind.__module__.split(".")[0], kind.__name__) for kind in type(trainer).__mro__]
    if ("trl", "SFTTrainer") in classes:
        return TRLHost
    packages = [package for package, _ in classes]
    for package, framework in INTEGRATIONS.items():
        if package in packages:
            raise UserTypeError(
                f"{type(trainer).__name__} is a trainer of {framework}, whose batches {name} reads through "
                f"qscope_posttrain.integrations.{package}; docs/integrations.md says how to use it."
            )
    if not isinstance(trainer, Trainer) or "trl" in packages:
        raise UserTypeError(
            f"{name} attaches to transformers.Trainer and trl.SFTTrainer (or a subclass), and to the trainers of "
            f"{' and '.join(INTEGRATIONS.values())} by qscope_posttrain.integrations; got {type(trainer).__name__}."
        )
    return Host
