"""SASFT, token penalty and KL anchor in verl's SFT trainer (verl 0.9): a `loss_fn` around its own.

    torchrun --nproc_per_node=8 -m qscope_posttrain.integrations.verl model.path=Qwen/Qwen3-1.7B-Base \
        data.train_files=sft.parquet data.custom_cls.path=pkg://qscope_posttrain.integrations.verl \
        data.custom_cls.name=LanguageSFTDataset \
        +qscope.method=token_penalty +qscope.target=zh +qscope.weight=40 +qscope.anchor_weight=1

is `python -m verl.trainer.sft_trainer` with all its options and a block `qscope` beside them (see `read_settings`).
In a script of one's own: `trainer = SFTTrainer(config)`, `attach(trainer)`, `trainer.fit()`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed import all_reduce
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils import tensordict_utils
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.device import auto_set_device, get_device_id
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group
from verl.workers.engine import EngineRegistry

from qscope_posttrain.errors import UserTypeError, UserValueError, did_you_mean
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.sft.anchor import Anchor
from qscope_posttrain.sft.attached_run import InstancePatches
from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.auxiliary_loss import FINAL_NORM, MetricWindow, Step
from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.config import KLAnchorConfig, SASFTConfig, TokenPenaltyConfig
from qscope_posttrain.sft.language_ids import SCRIPT, SampleLanguage
from qscope_posttrain.sft.logits import LogitHead
from qscope_posttrain.sft.loss import Normalizer
from qscope_posttrain.sft.masks import IGNORED_LABEL, PADDING_ID, TokenBatch
from qscope_posttrain.sft.train_data import languages_of, without_effect

LANGUAGE_IDS = "qscope_language_ids"  # Entry of a row and of the batch: the language id of each token
_METHODS = {"sasft": SASFTConfig, "token_penalty": TokenPenaltyConfig, "kl_anchor": KLAnchorConfig}


class LanguageRows:
    """Mixin for a data set of verl: its rows carry the language of their tokens, as decided by what `attach` sets."""

    decide: Callable[[Mapping[str, Any]], int] | None = None
    reads_tokens = False  # Whether `decide` needs the tokens beside the columns

    def __getitem__(self, item: int) -> dict[str, Any]:
        if self.decide is None:
            raise UserValueError(
                f"{type(self).__name__} gives rows for qscope's losses, and none is attached, so this would train "
                "without. Start with `-m qscope_posttrain.integrations.verl` in place of `-m verl.trainer.sft_trainer` "
                "(or call its attach(trainer)), or remove data.custom_cls."
            )
        row: dict[str, Any] = super().__getitem__(item)  # type: ignore[misc]
        row[LANGUAGE_IDS] = torch.full_like(row["input_ids"], self.decide(self.example(item, row)))
        return row

    def example(self, item: int, row: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The columns of a row, and with `reads_tokens` its tokens and labels."""
        example: dict[str, Any] = self.dataframe.iloc[item].to_dict()  # type: ignore[attr-defined]
        if self.reads_tokens:
            row = super().__getitem__(item) if row is None else row  # type: ignore[misc]
            labels = row["input_ids"].masked_fill(row["loss_mask"] == 0, IGNORED_LABEL)
            example |= {"input_ids": row["input_ids"].tolist(), "labels": labels.tolist()}
        return example


class LanguageSFTDataset(LanguageRows, MultiTurnSFTDataset):
    """verl's own data set of conversations in parquet files, with a further column of languages."""


def read_settings(block: Mapping[str, Any] | DictConfig | None) -> AuxiliaryLossCallback:
    """The loss that a block `qscope` describes; nothing of verl is needed to check it.

    Keys: `method` (sasft, token_penalty or kl_anchor), `features` (path of a FeatureSet, for sasft), `target_token_ids`
    (optional), and the fields of `SASFTConfig`, `TokenPenaltyConfig` or `KLAnchorConfig`.

    Raises:
        ValueError, TypeError, FileNotFoundError: a key or value that cannot work.
    """
    if not block:
        raise UserValueError(
            "The config has no block `qscope`, so nothing would be added to verl's loss. Give it, for example "
            "+qscope.method=token_penalty +qscope.target=zh, or start verl.trainer.sft_trainer itself."
        )
    options: dict[str, Any] = dict(OmegaConf.to_container(block, resolve=True) if OmegaConf.is_config(block) else block)
    method = options.pop("method", None)
    if method not in _METHODS:
        hint = did_you_mean(str(method), _METHODS)
        raise UserValueError(f"qscope.method must be one of {', '.join(_METHODS)}; got {method!r}.{hint}")
    given, features = options.pop("target_token_ids", None), options.pop("features", None)
    token_ids = None if given is None else torch.as_tensor(given)
    config = _METHODS[method].of(None, **options)
    if method == "sasft":
        if features is None:
            raise UserValueError("qscope.method=sasft needs qscope.features, the path of a FeatureSet.")
        return SASFTCallback(features, config=config, target_token_ids=token_ids)
    if features is not None:
        raise UserValueError(f"qscope.method={method} uses no features; leave qscope.features out.")
    kind = TokenPenaltyCallback if method == "token_penalty" else KLAnchorCallback
    return kind(config=config, target_token_ids=token_ids)


def attach(trainer: SFTTrainer, settings: Mapping[str, Any] | AuxiliaryLossCallback | None = None) -> AddedLoss:
    """Add a loss to a constructed trainer of verl, until `detach()`.

    Args:
        trainer: verl's, with an FSDP engine.
        settings: what `read_settings` takes or returns; None is the block `qscope` of the trainer's config.

    Raises:
        TypeError: another trainer.
        ValueError: settings, an engine or training data that cannot work.
    """
    if not isinstance(trainer, SFTTrainer):
        raise UserTypeError(f"attach() takes verl's SFTTrainer (not the one of Ray); got {type(trainer).__name__}.")
    if settings is None:
        settings = trainer.config.get("qscope")
    loss = settings if isinstance(settings, AuxiliaryLossCallback) else read_settings(settings)
    _check_engine(trainer, loss)
    _give_languages(trainer, loss)
    return AddedLoss(trainer, loss)


def _check_engine(trainer: SFTTrainer, loss: AuxiliaryLossCallback) -> None:
    engine, model = trainer.engine_config, trainer.model_config
    if engine.strategy not in ("fsdp", "fsdp2"):
        raise UserValueError(f"qscope works with engine.strategy fsdp and fsdp2; got {engine.strategy}.")
    if engine.ulysses_sequence_parallel_size > 1:
        raise UserValueError(
            "qscope does not work with Ulysses sequence parallelism, which splits a sequence over ranks, so that no "
            "rank holds the positions that belong to its labels: set engine.ulysses_sequence_parallel_size=1 (got "
            f"{engine.ulysses_sequence_parallel_size})."
        )
    if model.use_fused_kernels and loss.config.needs_logits:
        raise UserValueError(
            "The token penalty and the anchor need the logits, which model.use_fused_kernels never computes: set it to "
            "False, or use method=sasft with anchor_weight=0."
        )


def _give_languages(trainer: SFTTrainer, loss: AuxiliaryLossCallback) -> None:
    """Tell the trainer's data sets how to decide languages. All training rows are read."""
    config, data = loss.config, trainer.train_dataset
    if not isinstance(data, LanguageRows):
        if not loss.reads_languages:
            return
        raise UserValueError(
            f"verl's {type(data).__name__} drops the language of a row. Set "
            "data.custom_cls.path=pkg://qscope_posttrain.integrations.verl data.custom_cls.name=LanguageSFTDataset, or "
            "make a data set of your own with the mixin LanguageRows."
        )
    for other in (data, trainer.val_dataset):  # the loss is not added in validation
        if isinstance(other, LanguageRows):
            other.decide = _no_language
    if not loss.reads_languages:
        return
    tokenizer = trainer.model_config.tokenizer
    decide = SampleLanguage(config.language, loss.languages, config.ignore_languages, tokenizer.decode)
    data.reads_tokens = callable(config.language) or config.language == SCRIPT
    counts = Counter(languages_of((data.example(i) for i in range(len(data))), decide, len(data)))
    if nothing := without_effect(counts, str(config.target), config.ignore_languages):
        warnings.warn(nothing, stacklevel=3)
    data.decide = partial(_language_id, decide)


def _language_id(decide: SampleLanguage, example: Mapping[str, Any]) -> int:
    return decide.id(decide(example))


def _no_language(example: Mapping[str, Any]) -> int:
    return PADDING_ID


class AddedLoss:
    """verl's `loss_fn` and a term; hooks on the model take what the term needs.

    A step's metrics get those that the same loss has on other trainers: `sasft/penalty` and so on.
    """

    def __init__(self, trainer: SFTTrainer, callback: AuxiliaryLossCallback) -> None:
        """Check the loss against the trainer's model, then hook it."""
        self.name, self.reads_languages = callback.name, callback.reads_languages
        self._engine, self._client = trainer.engine, trainer.training_client
        self._inner: Any = self._client.loss_fn
        self._module = module = trainer.engine.module
        if isinstance(self._inner, AddedLoss) and self._inner.name == self.name:
            raise UserValueError(f"A loss named {self.name!r} is already attached to this trainer: detach() it first.")
        callback = copy(callback)  # the user's may serve trainers of transformers too
        callback.logits_given = True
        if callback.config.anchor > 0 or isinstance(callback, KLAnchorCallback):
            callback.anchor_model = _StartingModel.of(trainer)
        # What the losses ask a trainer for.
        subject: Any = SimpleNamespace(model=module, processing_class=trainer.model_config.tokenizer)
        self.loss = callback.prepare(subject)
        self._window = MetricWindow()
        self._in_window: Tensor | None = None
        self._micro_batches = 0
        self._forget()
        self.loss.capture.attach()
        before = module.register_forward_pre_hook(self._before, with_kwargs=True)
        self._handles = [before, module.register_forward_hook(self._after)]
        self._patches = InstancePatches(self._client)
        self._patches.wrap("train_batch", self._train_batch)
        self._client.set_loss_fn(self)

    def detach(self) -> None:
        """Leave the model and the trainer, which goes on with the loss that it had."""
        for handle in self._handles:
            handle.remove()
        self.loss.capture.remove()
        self._forget()
        self._patches.restore()
        self._client.set_loss_fn(self._inner)

    # The forward. In eval mode (validation, the starting model) nothing is kept.

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            self._forget()
            self._inputs, self.loss.capture.active = kwargs, True

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training:
            self._logits = output.logits if self.loss.config.needs_logits else None
            self.loss.capture.active = False  # backward runs checkpointed layers again

    def _forget(self) -> None:
        """Release the graph of the forward."""
        self._inputs: dict[str, Any] = {}
        self._logits: Tensor | None = None
        self.loss.capture.active = False
        self.loss.capture.clear()

    # In place of verl's functions

    def __call__(self, model_output: Any, data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
        """The loss of one micro-batch; in validation verl's own."""
        loss, metrics = self._inner(model_output=model_output, data=data, dp_group=dp_group)
        if not self._module.training:
            return loss, metrics
        try:
            term, sums = self._term(data)
            self._window.add(sums, loss.device)
            self._micro_batches += 1
            # A term that only measures must not even change a bit.
            changes = self.loss.config.weight > 0 or self.loss.config.anchor > 0
            return (loss + term.to(loss) if changes else loss), metrics
        finally:
            self._forget()

    def _train_batch(self, original: Callable[..., Any], data: TensorDict) -> Any:
        """An optimizer step: all micro-batches of this rank."""
        self._window, self._micro_batches = MetricWindow(), 0
        if self.loss.config.normalization == "paper":
            self._in_window = self._sum(
                self.loss.eligible(self._tokens_of(data, packed=True)).sum().to(get_device_id())
            )
        output = original(data)
        if not self._micro_batches:
            raise RuntimeError("verl took a step without qscope's loss: its loss_fn was replaced after attach().")
        totals = self._window.totals(SimpleNamespace(reduce=lambda sums, reduction: self._sum(sums)))
        found = self.loss.metrics(totals, 1, self._engine.get_data_parallel_size())
        metrics = tensordict_utils.get(output, "metrics")
        metrics.update({f"{self.name}/{key}": value for key, value in found.items()})
        return output

    def _sum(self, values: Tensor) -> Tensor:
        """Over the ranks that hold different data."""
        all_reduce(values, group=self._engine.get_data_parallel_group())
        return values

    # The term

    def _term(self, data: TensorDict) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to add, weights included, and its sums."""
        outputs = self.loss.capture.require()
        packed = tensordict_utils.get_non_tensor_data(data, "use_remove_padding", True)
        batch = self._tokens_of(data, packed, next(iter(outputs.values())).shape[:2])
        layers, named = self.loss.captured(batch.labels)
        if self._logits is not None:
            # The terms index them, which copies: flash-attention's cross-entropy writes its gradient into its logits.
            named[FINAL_NORM] = self._logits
        # As verl's own loss: summed over micro-batches, and over ranks whose gradients are then averaged.
        kind, ranks = self.loss.config.normalization, data["dp_size"]
        if kind == "official":
            normalizer = Normalizer(kind, batch.labeled().sum(), 1, 1)
        else:
            count = self._in_window if kind == "paper" else data["batch_num_tokens"]
            normalizer = Normalizer(kind, torch.as_tensor(count), ranks, 1)
        return self.loss.value(Step(batch, self.loss.eligible(batch), layers, named, normalizer, self._inputs))

    def _tokens_of(self, data: TensorDict, packed: bool, shape: torch.Size | None = None) -> TokenBatch:
        """Labels, languages and first tokens in the layout `[batch, tokens]` that the model got.

        Packed (`use_remove_padding`) the rows follow one another, perhaps with padding behind; else each is padded.
        """
        ids, offsets = data["input_ids"].values(), data["input_ids"].offsets()
        lengths = offsets.diff()
        row = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)
        column = torch.arange(len(ids), device=ids.device)
        first = column == offsets[row]
        size = torch.Size((1, len(ids)))
        if not packed:
            row, column, size = row, column - offsets[row], torch.Size((len(lengths), int(lengths.max())))
        shape = size if shape is None else shape
        if shape != size and not (packed and shape[0] == 1 and shape[1] > size[1]):
            raise UserValueError(
                f"The model's hidden states are {list(shape)} and the tokens of the batch {list(size)}, so that labels "
                "cannot be told apart: the model adds, drops or splits tokens."
            )
        if packed:
            row = torch.zeros_like(row)

        def placed(values: Tensor, padding: int) -> Tensor:
            return values.new_full(shape, padding).index_put_((row, column), values)

        languages = data[LANGUAGE_IDS].values() if self.reads_languages else torch.zeros_like(ids)
        labels = ids.masked_fill(data["loss_mask"].values() == 0, IGNORED_LABEL)
        starts = placed(first.long(), 0).bool()
        return TokenBatch(placed(labels, IGNORED_LABEL), placed(languages, PADDING_ID), starts)


class _StartingModel(Anchor):
    """The model without its adapter, or a second engine of verl that holds `model.path`, sharded as the trained one."""

    def __init__(self, engine: Any, adapted: bool) -> None:
        super().__init__(None)
        self._engine, self._adapted = engine, adapted

    @classmethod
    def of(cls, trainer: SFTTrainer) -> _StartingModel:
        if trainer.model_config.lora_rank > 0:
            return cls(trainer.engine, adapted=True)
        engine = EngineRegistry.new(
            model_type="language_model",
            backend=trainer.engine_config.strategy,
            model_config=trainer.model_config,
            engine_config=trainer.engine_config,
            optimizer_config=trainer.optimizer_config,
            checkpoint_config=trainer.checkpoint_config,
        )
        engine.initialize()
        engine.module.requires_grad_(False)
        engine.optimizer = engine.lr_scheduler = None
        return cls(engine, adapted=False)

    @torch.no_grad()
    def start(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, LogitHead]:
        """The starting model's logits."""
        module = self._engine.module
        if self._adapted:
            with self._engine.disable_adapter(), evaluation_mode(module):
                return module(**inputs).logits, LogitHead(None)
        with self._engine.eval_mode():
            return module(**inputs).logits, LogitHead(None)


@hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None)
def main(config: DictConfig) -> None:
    """verl's SFT trainer with the loss of the block `qscope`."""
    loss = read_settings(config.get("qscope"))
    auto_set_device(config)
    initialize_global_process_group()
    trainer = SFTTrainer(config=config)
    attach(trainer, loss)
    trainer.fit()
    destroy_global_process_group()


if __name__ == "__main__":
    # By its own name, under which verl imports the data set: a module that runs as a script is another one.
    from qscope_posttrain.integrations import verl

    verl.main()
