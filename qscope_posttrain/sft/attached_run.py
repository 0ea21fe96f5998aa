"""One callback attached to one trainer: what it changes on the trainer, what it counts, and how it leaves."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.capture import LayerCapture
from qscope_posttrain.sft.auxiliary_loss import AuxiliaryLoss, MetricWindow, Step
from qscope_posttrain.sft.masks import TokenBatch
from qscope_posttrain.sft.normalization import count_in_window, micro_batch_normaliser
from qscope_posttrain.sft.train_data import with_languages

if TYPE_CHECKING:
    from qscope_posttrain.sft.attachment import AuxiliaryLossCallback


class AttachedRun:
    """Lives on the trainer, in the methods that it wraps, and dies with it; the callback only knows it weakly.

    Between two trainings of the trainer a wrapped `train` is all that is left, which comes back with the rest.
    """

    def __init__(
        self, callback: AuxiliaryLossCallback, trainer: Trainer, loss: AuxiliaryLoss, columns: tuple[str, ...] | None
    ) -> None:
        """
        Args:
            callback: the callback, which is or will be in the trainer's list.
            trainer: a constructed trainer.
            loss: the term, made for this trainer.
            columns: those that decide the languages of samples; None if no language is looked at.
        """
        self.callback = callback
        self.trainer = trainer
        self.loss = loss
        self.columns = columns
        self._data = trainer.train_dataset
        self.key = f"{callback.name}_language_ids"
        self.hooked = self.training = False
        self._entry = InstancePatches(trainer)
        self._patches = InstancePatches(trainer)
        self._entry.wrap("train", self._train)
        # A model may outlive its trainer.
        weakref.finalize(self, loss.capture.remove)
        self.restart()
        self.hook()

    @property
    def removed(self) -> bool:
        """Whether the trainer's user has taken the callback out of the trainer's list."""
        return self.callback not in self.trainer.callback_handler.callbacks

    def hook(self) -> None:
        """Change the trainer and its model for a training."""
        self.loss.capture.attach()
        self._patches.wrap("compute_loss", self._compute_loss)
        self._patches.wrap("get_batch_samples", self._get_batch_samples)
        if self.columns is not None:
            self._patches.wrap("get_train_dataloader", self._get_train_dataloader)
        self.hooked = True

    def unhook(self) -> None:
        """Undo `hook`. Does nothing if not hooked."""
        self._patches.restore()
        self.loss.capture.remove()
        self.loss.capture.clear()
        self.hooked = False

    def leave(self) -> None:
        """Undo everything but the entry in the trainer's list, which may be in iteration."""
        self.unhook()
        self._entry.restore()
        self.callback.runs.discard(self)

    # Counting

    def restart(self) -> None:
        """Forget what was counted: a training begins, or begins again with smaller batches."""
        self.window = MetricWindow(self.loss.window_names())
        self.steps = self.micro_batches = self.hook_calls = 0
        self.eligible_in_window: Tensor | None = None

    def require_micro_batches(self) -> None:
        """RuntimeError where a step was taken without the term."""
        if self.micro_batches < self.steps:
            raise RuntimeError(
                f"A step was taken without the loss of {type(self.callback).__name__}: this trainer's compute_loss was "
                "replaced after the callback had attached, or its training_step does not call compute_loss. Change "
                "compute_loss in a subclass, or before callback.attach(trainer)."
            )

    def flush(self) -> None:
        """Hand the window to the trainer's own metrics just before it logs.

        All ranks get here in the same step, so that the reduction meets on all of them.
        """
        if self.steps == 0:
            return
        trainer: Any = self.trainer
        ranks = trainer.accelerator.num_processes
        values = self.loss.metrics(self.window.totals(trainer.accelerator), self.steps, ranks)
        values["hook_calls"] = self.hook_calls / max(self.micro_batches * len(self.loss.capture.calls), 1)
        for key, value in values.items():
            trainer._metrics["train"][f"{self.callback.name}/{key}"].append(value)
        self.steps = self.micro_batches = self.hook_calls = 0

    # In place of the trainer's methods

    def _train(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self.removed:
            self.leave()
            return original(*args, **kwargs)
        if self.trainer.train_dataset is not self._data:
            self.columns, self._data = self.callback.columns_of(self.trainer), self.trainer.train_dataset
        if not self.hooked:
            self.hook()
        self.training = True
        try:
            return original(*args, **kwargs)
        finally:  # also after KeyboardInterrupt: a trainer that lives on must not keep our hooks
            self.training = False
            self.unhook()
            if self.removed:
                self.leave()

    def _get_train_dataloader(self, original: Any) -> Any:
        callback, config = self.callback, self.callback.config
        return with_languages(
            original,
            self.trainer,
            self.columns or (),
            config.language,
            callback.languages,
            config.ignore_languages,
            self.key,
        )

    def _get_batch_samples(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        batches, num_items_in_batch = original(*args, **kwargs)
        if self.loss.config.normalization == "paper" and batches:
            counts = [self.loss.eligible(self._token_batch(batch)).sum() for batch in batches]
            self.eligible_in_window = count_in_window(self.trainer, torch.stack(counts).sum())
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
        batch = self._token_batch(inputs)
        plain = {key: value for key, value in inputs.items() if key != self.key}
        if self.removed:
            return original(model, plain, **options)
        capture = self.loss.capture
        capture.clear()
        capture.active = True
        try:
            # TRL's compute_loss adds to the batch what only the whole model understands: it gets a copy of its own.
            result = original(model, dict(plain), **options)
            loss = result[0] if return_outputs else result
            layers, named = self.loss.captured(batch.labels)
            self.micro_batches += 1
            self.hook_calls += sum(capture.calls.values())
            eligible = self.loss.eligible(batch)
            normaliser = micro_batch_normaliser(
                self.trainer,
                self.loss.config.normalization,
                batch,
                eligible,
                num_items_in_batch,
                self.eligible_in_window,
            )
            # With PEFT the starting model is the trained one: its forward is no business of any capture.
            with _paused(self.callback.captures_on(self.trainer)):
                term, sums = self.loss.value(Step(batch, eligible, layers, named, normaliser, plain))
            self.window.add([value.to(loss.device) for value in sums])
            if not self.callback.measures_only:
                loss = loss + term.to(loss)
            return (loss, *result[1:]) if return_outputs else loss
        finally:
            capture.active = False
            # The captured tensors hold the graph of the whole forward.
            capture.clear()

    def _token_batch(self, inputs: Mapping[str, Any]) -> TokenBatch:
        if self.columns is None:
            return TokenBatch.from_inputs(inputs, None)
        if self.key not in inputs:
            raise UserValueError(
                f"The batch has no {self.key!r} (its keys: {', '.join(inputs)}): it does not come from the trainer's "
                f"get_train_dataloader() with {type(self.callback).__name__} attached."
            )
        return TokenBatch.from_inputs(inputs, inputs[self.key])


@contextmanager
def _paused(captures: Sequence[LayerCapture]) -> Iterator[None]:
    """None of `captures` active, then each as it was."""
    active = [capture for capture in captures if capture.active]
    for capture in active:
        capture.active = False
    try:
        yield
    finally:
        for capture in active:
            capture.active = True


_ABSENT = object()


class InstancePatches:
    """Wraps methods on one instance; `restore()` undoes it in any order relative to other wrappers.

    A wrapper gets the method that was there before as its first argument. When someone else has wrapped the method
    again meanwhile, ours cannot be taken out of the chain: it then passes every call through unchanged.
    """

    def __init__(self, target: object) -> None:
        self._target = target
        self._entries: list[tuple[str, Any, _Wrapper]] = []

    def wrap(self, name: str, function: Callable[..., Any]) -> None:
        """Replace `target.name(*args)` by `function(original, *args)`."""
        before = vars(self._target).get(name, _ABSENT)
        wrapper = _Wrapper(getattr(self._target, name), function, before)
        setattr(self._target, name, wrapper)
        self._entries.append((name, before, wrapper))

    def restore(self) -> None:
        """Undo all wraps of this object."""
        for name, before, wrapper in reversed(self._entries):
            wrapper.alive = False
            if vars(self._target).get(name) is not wrapper:
                continue
            # A wrapper below ours may have been switched off before us: do not bring it back.
            while isinstance(before, _Wrapper) and not before.alive:
                before = before.before
            if before is _ABSENT:
                delattr(self._target, name)
            else:
                setattr(self._target, name, before)
        self._entries.clear()


class _Wrapper:
    """A callable in place of a method."""

    def __init__(self, original: Callable[..., Any], function: Callable[..., Any], before: Any) -> None:
        functools.update_wrapper(self, original, updated=())
        self.original = original
        self.function = function
        self.before = before
        self.alive = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.alive:
            return self.original(*args, **kwargs)
        return self.function(self.original, *args, **kwargs)


def calling_trainer(callback: object) -> Trainer:
    """The trainer whose constructor is now calling `callback.on_init_end`.

    transformers tells callbacks nothing about their trainer, but its `__init__` is on the stack at this moment.

    Raises:
        RuntimeError: no such frame; says how to attach instead.
    """
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    name = type(callback).__name__
    raise RuntimeError(
        f"{name} could not find the trainer that it was given to. Attach it by hand after construction: "
        f"trainer = SFTTrainer(...); callback.attach(trainer)."
    )
