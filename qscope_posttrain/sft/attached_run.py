"""One callback attached to one trainer: its changes to the trainer, its counts, and how it leaves."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from qscope_posttrain.sft.auxiliary_loss import AuxiliaryLoss, MetricWindow, Step
from qscope_posttrain.sft.host import Host
from qscope_posttrain.sft.loss import Normalizer, count_in_window
from qscope_posttrain.sft.masks import TokenBatch
from qscope_posttrain.sft.watch import Watch

if TYPE_CHECKING:
    from qscope_posttrain.sft.data.language_ids import SampleLanguage


class AttachedRun:
    """Lives on the trainer, in the methods that it wraps, and dies with it; the callback only knows it weakly.

    Between two trainings of the trainer only a wrapped `train` is left, which brings the rest back.
    """

    def __init__(self, host: Host, loss: AuxiliaryLoss, decide: SampleLanguage | None) -> None:
        """`loss` was made for the host's trainer; `decide` tells the languages of its data, None if none is read."""
        self.host = host
        self.callback = host.callback
        self.trainer: Trainer = host.trainer
        self.loss = loss
        self.decide = decide
        self._data = self.trainer.train_dataset
        # Entries of a batch on its way to compute_loss: what the collator adds, and what was read from it
        self.key, self.read_key = f"{self.callback.name}_language_ids", f"{self.callback.name}_tokens"
        self.hooked = self.training = False
        self._entry = InstancePatches(self.trainer)
        self._patches = InstancePatches(self.trainer)
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
        self._patches.wrap("log", self._log)
        if self.decide is not None:
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

    # Counts

    def restart(self) -> None:
        """Forget all counts: a training begins, or begins again with smaller batches."""
        self.window = MetricWindow()
        self.to_log: dict[str, float] = {}
        self.steps = self.micro_batches = self.hook_calls = 0
        self.called = False  # since the last optimizer step
        self.watch = Watch(type(self.callback).__name__, self.loss.config.weight)
        self.eligible_in_window: Tensor | None = None

    def count_step(self) -> None:
        """Count an optimizer step; RuntimeError where it was taken without the term."""
        self.steps += 1
        if not self.called:
            raise RuntimeError(
                f"A step was taken without the loss of {type(self.callback).__name__}: this trainer's compute_loss was "
                "replaced after the callback had attached, its training_step does not call compute_loss, or the model "
                "was in evaluation mode. Change compute_loss in a subclass, or before callback.attach(trainer)."
            )
        self.called = False

    def flush(self) -> None:
        """Turn the window into values for the trainer's log, which comes next.

        All ranks get here in the same step, so that the reduction meets on all of them.
        """
        if self.steps == 0:
            return
        accelerator = self.trainer.accelerator
        values = self.loss.metrics(self.window.totals(accelerator), self.steps, accelerator.num_processes)
        values["hook_calls"] = self.hook_calls / max(self.micro_batches * len(self.loss.capture.calls), 1)
        self.to_log = {f"{self.callback.name}/{key}": value for key, value in values.items()}
        self.watch.look(values, self.steps)
        self.steps = self.micro_batches = self.hook_calls = 0

    # In place of the trainer's methods

    def _train(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self.removed:
            self.leave()
            return original(*args, **kwargs)
        if self.trainer.train_dataset is not self._data:
            self.decide, self._data = self.host.sample_language(), self.trainer.train_dataset
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

    def _get_train_dataloader(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        decide: Any = self.decide
        return self.host.train_dataloader(functools.partial(original, *args, **kwargs), decide, self.key)

    def _get_batch_samples(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        batches, num_items_in_batch = original(*args, **kwargs)
        read = [self.host.token_batch(batch, self.decide, self.key) for batch in batches]
        for batch, tokens in zip(batches, read, strict=True):
            batch[self.read_key] = tokens.stacked()
        if self.loss.config.normalization == "paper" and read:
            counts = [self.loss.eligible(tokens).sum() for tokens in read]
            self.eligible_in_window = count_in_window(self.trainer, torch.stack(counts).sum())
        return batches, num_items_in_batch

    def _log(self, original: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        model: Any = self.trainer.model
        if model.training:  # or else these are the values of an evaluation
            logs.update(self.to_log)
            self.to_log = {}
        return original(logs, *args, **kwargs)

    def _compute_loss(
        self,
        original: Any,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        plain = {name: value for name, value in inputs.items() if name not in (self.key, self.read_key)}
        if not model.training or self.removed:
            return original(model, plain, **options)
        if self.read_key in inputs:
            batch = TokenBatch.from_stacked(inputs[self.read_key])
        else:  # a batch of the data loader that has not passed through get_batch_samples
            batch = self.host.token_batch(dict(inputs), self.decide, self.key)
        capture, paused = self.loss.capture, []
        capture.clear()
        capture.active = True
        try:
            # TRL's compute_loss adds to the batch what only the whole model understands: it gets a copy of its own.
            result = original(model, dict(plain), **options)
            loss = result[0] if return_outputs else result
            layers, named = self.loss.captured(batch.labels)
            self.called, self.micro_batches = True, self.micro_batches + 1
            self.hook_calls += sum(capture.calls.values())
            # With PEFT the starting model of an anchor is the trained one, and its forward must not be captured.
            paused = [other for other in self.callback.captures_on(self.trainer) if other.active]
            for other in paused:
                other.active = False
            given = self.host.model_inputs(plain)
            eligible, kind = self.loss.eligible(batch), self.loss.config.normalization
            normalizer = Normalizer.of(self.trainer, kind, batch, eligible, num_items_in_batch, self.eligible_in_window)
            loss, sums = self.loss.added_to(loss, Step(batch, eligible, layers, named, normalizer, given))
            self.window.add(sums, loss.device)
            return (loss, *result[1:]) if return_outputs else loss
        finally:
            for other in paused:
                other.active = True
            capture.active = False
            # The captured tensors hold the graph of the whole forward.
            capture.clear()


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
        return self.function(self.original, *args, **kwargs) if self.alive else self.original(*args, **kwargs)


def calling_trainer(callback: object) -> Trainer:
    """The trainer whose constructor is now calling `callback.on_init_end`.

    transformers passes callbacks no trainer, but its `__init__` is on the stack at this moment.

    Raises:
        RuntimeError: no such frame; says how to attach instead.
    """
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError(
        f"{type(callback).__name__} could not find the trainer that it was given to. Attach it by hand after "
        "construction: trainer = Trainer(...); callback.attach(trainer)."
    )
