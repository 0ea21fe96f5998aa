"""A loss of ours inside of a step of verl's FSDP engines: what `integrations.verl` attaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed import all_reduce
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils import tensordict_utils
from verl.utils.device import get_device_id
from verl.workers.engine import EngineRegistry

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.sft.attached_run import InstancePatches
from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.auxiliary_loss import FINAL_NORM, AuxiliaryLoss, MetricWindow, Step
from qscope_posttrain.sft.baselines import KLAnchorCallback
from qscope_posttrain.sft.data.language_ids import SampleLanguage
from qscope_posttrain.sft.logits import Anchor, LogitHead
from qscope_posttrain.sft.loss import Normalizer
from qscope_posttrain.sft.masks import IGNORED_LABEL, PADDING_ID, TokenBatch
from qscope_posttrain.sft.watch import Watch


def language_entry(name: str) -> str:
    """The entry of a row and of a batch with the language id of each token, for the loss `name`."""
    return f"{name}_language_ids"


class AddedLoss:
    """A term beside verl's `loss_fn`; hooks on the model take what the term needs.

    A step's metrics get those that the same loss has on other trainers: `sasft/penalty` and so on.
    """

    def __init__(self, trainer: SFTTrainer, callback: AuxiliaryLossCallback, decide: SampleLanguage | None) -> None:
        """Check the loss against the trainer; nothing is changed. `decide` tells its languages, if it reads any."""
        self.name, self._decide = callback.name, decide
        self._engine, self._client, self._data = trainer.engine, trainer.training_client, trainer.train_dataset
        self._module = module = trainer.engine.module
        self._attached: dict[str, AddedLoss] = vars(trainer).setdefault("qscope_losses", {})
        if self.name in self._attached:
            raise UserValueError(
                f"A loss named {self.name!r} is already attached to this trainer: detach() it first, or give a "
                "callback of another name."
            )
        own: Any = copy(callback)  # the user's may serve trainers of transformers too
        own.logits_given = True
        if own.config.anchor > 0 or isinstance(callback, KLAnchorCallback):
            own.anchor_model = _StartingModel(trainer)
        # What the losses ask a trainer for.
        subject: Any = SimpleNamespace(model=module, processing_class=trainer.model_config.tokenizer)
        self.loss: AuxiliaryLoss = own.prepare(subject)
        self.loss.begin()
        self._window, self._watch = MetricWindow(), Watch(self.loss.callback_name, self.loss.config.weight)
        self._in_window: Tensor | None = None
        self._micro_batches = 0
        self._inputs: dict[str, Any] = {}
        self._logits: Tensor | None = None
        self._handles: list[Any] = []
        self._patches = InstancePatches(self._client)

    def attach(self) -> None:
        """Change the trainer, its data set and its model."""
        self._attached[self.name] = self
        if self._decide is not None:
            self._data.deciders[self.name] = self._decide
        self.loss.capture.attach()
        before = self._module.register_forward_pre_hook(self._before, with_kwargs=True)
        self._handles = [before, self._module.register_forward_hook(self._after)]
        self._patches.wrap("train_batch", self._train_batch)
        self._patches.wrap("loss_fn", self._add)

    def detach(self) -> None:
        """Undo `attach`: the trainer goes on with the losses that it has beside this one."""
        if self._attached.get(self.name) is not self:
            return
        del self._attached[self.name]
        for handle in self._handles:
            handle.remove()
        self.loss.capture.remove()
        self._forget()
        self._patches.restore()
        if self._decide is not None:
            del self._data.deciders[self.name]

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
        self._inputs, self._logits = {}, None
        self.loss.capture.active = False
        self.loss.capture.clear()

    # In place of verl's functions

    def _add(self, original: Callable[..., Any], data: TensorDict, **given: Any) -> tuple[Tensor, dict[str, Any]]:
        """The loss of one micro-batch; in validation verl's own."""
        loss, metrics = original(data=data, **given)
        if not self._module.training:
            return loss, metrics
        try:
            loss, sums = self.loss.added_to(loss, self._step(data))
            self._window.add(sums, loss.device)
            self._micro_batches += 1
            return loss, metrics
        finally:
            self._forget()

    def _train_batch(self, original: Callable[..., Any], data: TensorDict) -> Any:
        """An optimizer step: all micro-batches of this rank."""
        self._window, self._micro_batches = MetricWindow(), 0
        if self.loss.config.normalization == "paper":
            eligible = self.loss.eligible(self._tokens_of(data, packed=True))
            self._in_window = self._sum(eligible.sum().to(get_device_id()))
        output = original(data)
        if not self._micro_batches:
            raise RuntimeError("verl took a step without qscope's loss: its loss_fn was replaced after attach().")
        totals = self._window.totals(SimpleNamespace(reduce=lambda sums, reduction: self._sum(sums)))
        found = self.loss.metrics(totals, 1, self._engine.get_data_parallel_size())
        self._watch.look(found, 1)
        metrics = tensordict_utils.get(output, "metrics")
        metrics.update({f"{self.name}/{key}": value for key, value in found.items()})
        return output

    def _sum(self, values: Tensor) -> Tensor:
        """Over the ranks that hold different data."""
        all_reduce(values, group=self._engine.get_data_parallel_group())
        return values

    def _step(self, data: TensorDict) -> Step:
        """The micro-batch after the model's forward."""
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
        return Step(batch, self.loss.eligible(batch), layers, named, normalizer, self._inputs)

    def _tokens_of(self, data: TensorDict, packed: bool, shape: torch.Size | None = None) -> TokenBatch:
        """Labels, languages and first tokens in the layout `[batch, tokens]` that the model got.

        Packed (`use_remove_padding`) the rows follow one another, perhaps with padding behind; else each is padded.
        """
        ids, offsets = data["input_ids"].values(), data["input_ids"].offsets()
        lengths = offsets.diff()
        place = torch.arange(len(ids), device=ids.device)
        row = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)
        column = place - offsets[row]
        first, size = column == 0, torch.Size((len(lengths), int(lengths.max())))
        if packed:
            row, column, size = torch.zeros_like(row), place, torch.Size((1, len(ids)))
        shape = size if shape is None else shape
        if shape != size and not (packed and shape[0] == 1 and shape[1] > size[1]):
            raise UserValueError(
                f"The model's hidden states are {list(shape)} and the tokens of the batch {list(size)}, so that labels "
                "cannot be distinguished: the model adds, drops or splits tokens."
            )

        def placed(values: Tensor, padding: int) -> Tensor:
            return values.new_full(shape, padding).index_put_((row, column), values)

        languages = data[language_entry(self.name)].values() if self._decide else torch.zeros_like(ids)
        labels = ids.masked_fill(data["loss_mask"].values() == 0, IGNORED_LABEL)
        starts = placed(first.long(), 0).bool()
        return TokenBatch(placed(labels, IGNORED_LABEL), placed(languages, PADDING_ID), starts)


class _StartingModel(Anchor):
    """The model without its adapter, or a second engine of verl that holds `model.path`, sharded as the trained one."""

    def __init__(self, trainer: SFTTrainer) -> None:
        super().__init__(None)
        self._engine, self._adapted = trainer.engine, trainer.model_config.lora_rank > 0
        if not self._adapted:
            configs = (trainer.model_config, trainer.engine_config, trainer.optimizer_config, trainer.checkpoint_config)
            self._engine = engine = EngineRegistry.new("language_model", trainer.engine_config.strategy, *configs)
            engine.initialize()
            engine.module.requires_grad_(False)
            engine.optimizer = engine.lr_scheduler = None

    @torch.no_grad()
    def start(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, LogitHead]:
        """The starting model's logits."""
        module = self._engine.module
        if self._adapted:
            with self._engine.disable_adapter(), evaluation_mode(module):
                return module(**inputs).logits, LogitHead(None)
        with self._engine.eval_mode():
            return module(**inputs).logits, LogitHead(None)
