"""What every auxiliary loss on a stock `SFTTrainer` has in common: attaching, capturing, adding, logging, leaving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.residual.capture import LayerCapture
from qscope_posttrain.sft.checks import check_resumed, check_trainer
from qscope_posttrain.sft.language_ids import LanguageRule
from qscope_posttrain.sft.loss import Normalization
from qscope_posttrain.sft.masks import TokenBatch
from qscope_posttrain.sft.metrics import MetricWindow
from qscope_posttrain.sft.normalisation import Normaliser, count_in_window, micro_batch_normaliser
from qscope_posttrain.sft.patches import InstancePatches, calling_trainer
from qscope_posttrain.sft.train_data import language_columns, with_languages

Self = TypeVar("Self", bound="AuxiliaryLossCallback")


@dataclass(eq=False)
class _Run:
    """What exists only while attached."""

    trainer: Trainer
    capture: LayerCapture
    patches: InstancePatches
    language_columns: tuple[str, ...]
    window: MetricWindow
    steps: int = 0
    micro_batches: int = 0
    hook_calls: int = 0
    eligible_in_window: Tensor | None = None


class AuxiliaryLossCallback(TrainerCallback, ABC):
    """Adds `weight * term` to the loss of a `trl.SFTTrainer`, without changing model, labels or data.

    Forward hooks capture what the term needs, and a wrapper around `trainer.compute_loss` adds it, so that loss
    scaling, accumulation, DDP, FSDP2 and DeepSpeed treat it as the loss that it is. All changes are on the trainer
    instance; they are undone at the end of training, after an exception in it, and by `detach()`.

    A subclass says what to capture, which positions count, and what the term is.
    """

    def __init__(
        self,
        *,
        name: str,
        weight: float,
        normalization: Normalization,
        languages: tuple[str, ...],
        language: LanguageRule,
        ignore_languages: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            name: prefix of the metrics; distinct for callbacks on the same trainer.
            weight: factor of the term. With 0 the term is measured and logged, and training is untouched bit for bit.
            normalization: see `normalisation.Normaliser`.
            languages: known languages; a token's language id is an index into them.
            language: how to tell the language of a sample, see `SASFTConfig.language`.
            ignore_languages: languages of samples that take no part.
        """
        self.name = name
        self.weight = weight
        self.normalization = normalization
        self.languages = languages
        self.language = language
        self.ignore_languages = ignore_languages
        self._run: _Run | None = None

    @property
    def measures_only(self) -> bool:
        """Whether the term is computed for the metrics alone, without gradient, and never added."""
        return self.weight == 0

    # What a subclass gives

    @abstractmethod
    def prepare(self, trainer: Trainer) -> LayerCapture:
        """Check everything against the trainer's model, build what the run needs, and say what to capture.

        Called before anything is changed: it may raise, and the capture must not be attached yet.
        """

    @abstractmethod
    def eligible(self, batch: TokenBatch) -> Tensor:
        """Positions that the term acts on, bool `[batch, tokens]`; what "paper" normalisation counts."""

    @abstractmethod
    def term(
        self,
        batch: TokenBatch,
        eligible: Tensor,
        capture: LayerCapture,
        normaliser: Normaliser,
        inputs: Mapping[str, Any],
    ) -> tuple[Tensor, list[Tensor]]:
        """The scalar to add to the loss (its weights included), and the values for the metric window.

        The window's values are sums over this micro-batch, in the order of `window_names()`. `inputs` is the batch as
        the model got it.
        """

    @abstractmethod
    def window_names(self) -> tuple[str, ...]:
        """Names of the sums that `term` returns."""

    @abstractmethod
    def metrics(self, totals: Mapping[str, float], steps: int) -> dict[str, float]:
        """What to log, from sums over a logging window of `steps` optimiser steps and over all ranks."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Settings and inputs as JSON values: a resumed run must have the same."""

    # Coming and going

    @property
    def attached(self) -> bool:
        return self._run is not None

    def attach(self: Self, trainer: Trainer) -> Self:
        """Attach to a constructed `SFTTrainer`; returns itself, so that `with callback.attach(trainer):` works too.

        Raises:
            RuntimeError: already attached.
            TypeError: not an `SFTTrainer`.
            ValueError: a set-up that cannot work, with what to change.
        """
        if self._run is not None:
            raise RuntimeError(f"This {type(self).__name__} is already attached to a trainer; detach() it first.")
        check_trainer(trainer, type(self).__name__)
        self._check_name(trainer)
        columns = language_columns(trainer, self.language, self.languages, self.ignore_languages)
        capture = self.prepare(trainer)
        capture.active = False
        capture.attach()
        patches = InstancePatches(trainer)
        patches.wrap("train", self._train)
        patches.wrap("compute_loss", self._compute_loss)
        patches.wrap("get_batch_samples", self._get_batch_samples)
        patches.wrap("get_train_dataloader", self._get_train_dataloader)
        self._run = _Run(trainer, capture, patches, columns, MetricWindow(self.window_names()))
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def detach(self) -> None:
        """Remove the hooks, restore the trainer and leave its list of callbacks. Does nothing if not attached."""
        if self._run is not None:
            trainer = self._run.trainer
            self._release()
            trainer.remove_callback(self)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _release(self) -> None:
        """Undo everything but the entry in the trainer's list, which may be in iteration."""
        if self._run is not None:
            self._run.patches.restore()
            self._run.capture.remove()
            self._run.capture.clear()
            self._run = None

    def _running(self) -> _Run:
        if self._run is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a trainer; call attach(trainer).")
        return self._run

    def _check_name(self, trainer: Trainer) -> None:
        for other in trainer.callback_handler.callbacks:
            if isinstance(other, AuxiliaryLossCallback) and other.attached and other.name == self.name:
                raise UserValueError(
                    f"A callback named {self.name!r} is already attached to this trainer; give one of the two another "
                    f"name, for example name='{self.name}_2', so that their metrics stay apart."
                )

    # Events of the trainer

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.attached:
            self.attach(calling_trainer(self))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.attached:
            raise RuntimeError(
                f"{type(self).__name__} is in the trainer's callbacks but no longer attached (an earlier training "
                "ended). Call callback.attach(trainer) before every train(), or trainer.remove_callback(callback)."
            )
        check_resumed(state, f"qscope_posttrain/{self.name}", self.identity())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._running().steps += 1
        if control.should_log or control.should_training_stop:
            self._flush()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_log:
            self._flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._release()

    def _flush(self) -> None:
        """Hand the window to the trainer's own metrics just before it logs.

        All ranks get here in the same step, so that the reduction meets on all of them.
        """
        run = self._running()
        if run.steps == 0:
            return
        trainer: Any = run.trainer
        values = self.metrics(run.window.totals(trainer.accelerator), run.steps)
        values["hook_calls"] = run.hook_calls / max(run.micro_batches * len(run.capture.calls), 1)
        for key, value in values.items():
            trainer._metrics["train"][f"{self.name}/{key}"].append(value)
        run.steps = run.micro_batches = run.hook_calls = 0

    # In place of the trainer's methods

    def _train(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except BaseException:  # also KeyboardInterrupt: a trainer that lives on must not keep our hooks
            self._release()
            raise

    def _get_train_dataloader(self, original: Any) -> Any:
        run = self._running()
        return with_languages(
            original,
            run.trainer,
            run.language_columns,
            self.language,
            self.languages,
            self.ignore_languages,
            self._batch_key,
        )

    def _get_batch_samples(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        batches, num_items_in_batch = original(*args, **kwargs)
        if self.normalization == "paper" and batches:
            run = self._running()
            counts = [self.eligible(self._token_batch(batch)).sum() for batch in batches]
            run.eligible_in_window = count_in_window(run.trainer, torch.stack(counts).sum())
        return batches, num_items_in_batch

    def _compute_loss(
        self,
        original: Any,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not model.training:
            return original(model, inputs, **options)
        run = self._running()
        batch = self._token_batch(inputs)
        inputs = {key: value for key, value in inputs.items() if key != self._batch_key}
        run.capture.clear()
        run.capture.active = True
        try:
            result = original(model, inputs, **options)
            run.capture.active = False
            loss = result[0] if return_outputs else result
            run.capture.require()
            run.micro_batches += 1
            run.hook_calls += sum(run.capture.calls.values())
            eligible = self.eligible(batch)
            normaliser = micro_batch_normaliser(
                run.trainer, self.normalization, batch, eligible, num_items_in_batch, run.eligible_in_window
            )
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.measures_only):
                term, sums = self.term(batch, eligible, run.capture, normaliser, inputs)
            run.window.add([value.to(loss.device) for value in sums])
            if not self.measures_only:
                loss = loss + term.to(loss)
            return (loss, *result[1:]) if return_outputs else loss
        finally:
            run.capture.active = False
            # The captured tensors hold the graph of the whole forward.
            run.capture.clear()

    @property
    def _batch_key(self) -> str:
        return f"{self.name}_language_ids"

    def _token_batch(self, inputs: Mapping[str, Any]) -> TokenBatch:
        if self._batch_key not in inputs:
            raise UserValueError(
                f"The batch has no {self._batch_key!r} (its keys: {', '.join(inputs)}): it does not come from the "
                f"trainer's get_train_dataloader() with {type(self).__name__} attached."
            )
        return TokenBatch.from_inputs(inputs, inputs[self._batch_key])
