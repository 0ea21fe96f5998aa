"""The base of every auxiliary loss on a trainer: attach, refuse what cannot work, leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakSet

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.capture import LayerCapture
from qscope_posttrain.provenance import check_resumed
from qscope_posttrain.sft.attached_run import AttachedRun, calling_trainer
from qscope_posttrain.sft.auxiliary_loss import AuxiliaryLoss
from qscope_posttrain.sft.config import LossConfig
from qscope_posttrain.sft.host import Host, host_class

Self = TypeVar("Self", bound="AuxiliaryLossCallback")


class AuxiliaryLossCallback(TrainerCallback, ABC):
    """Adds `weight * term` to the loss of a `transformers.Trainer` of a causal language model or a `trl.SFTTrainer`.

    Forward hooks capture what the term needs, and a wrapper around `trainer.compute_loss` adds it, so that loss
    scaling, accumulation, DDP, FSDP2 and DeepSpeed treat it as the loss that it is. Model, labels and data stay as they
    are; what differs between trainers is in `sft.host`. All changes are on the trainer instance and are undone at the
    end of training and after an exception in it. A further `trainer.train()` makes them again, until `detach()` or
    `trainer.remove_callback(callback)`: then the trainer is a plain one.

    One object serves several trainers, one after another or in turns: it holds settings, and each trainer holds the
    state of its own runs.
    """

    logits_given = False
    """Whether a step brings the model's logits: then a term needs neither the weight of the output embedding nor whole
    parameters. An integration sets it."""

    def __init__(
        self,
        config: LossConfig,
        languages: tuple[str, ...],
        name: str,
        target_token_ids: Tensor | None = None,
        anchor_model: nn.Module | None = None,
    ) -> None:
        """
        Args:
            config: the settings.
            languages: known languages; a token's language id is an index into them.
            name: prefix of the metrics; distinct for callbacks on the same trainer.
            target_token_ids: `[n]` int64, the tokens that write the target language. By default the entries of the
                trainer's tokenizer that write the target's script.
            anchor_model: the starting model of the anchor, by default the model without its adapter (PEFT) or a
                frozen copy made at attach, which takes the memory of the model's weights once more until `detach()`.
                A given one is moved to the device of the batches, and otherwise left as it is.

        Raises:
            ValueError: a starting model for a loss without an anchor.
        """
        if anchor_model is not None and getattr(config, "anchor_weight", None) == 0:
            raise UserValueError(
                f"anchor_model is the starting model of the KL anchor, and {type(config).__name__}.anchor_weight is 0, "
                "so that it would do nothing. Give anchor_weight=1.0, say, or leave anchor_model out."
            )
        self.config: Any = config
        self.languages = languages
        self.name = name
        self.target_token_ids = target_token_ids
        self.anchor_model = anchor_model
        self.runs: WeakSet[AttachedRun] = WeakSet()

    @abstractmethod
    def prepare(self, trainer: Trainer) -> AuxiliaryLoss:
        """Check everything against the trainer and its model, and make the term for it.

        Called before anything is changed: it may raise, and must not attach the term's capture.
        """

    def identity(self) -> dict[str, Any]:
        """Settings and inputs as JSON values: a resumed run must have the same."""
        return {"config": self.config.to_dict()}

    @property
    def reads_languages(self) -> bool:
        """Whether the language of a sample makes a difference."""
        return self.config.target is not None

    def attach(self: Self, trainer: Trainer, host: type[Host] | None = None) -> Self:
        """Attach to a constructed trainer; returns itself, so that `with callback.attach(trainer):` works too.

        Args:
            trainer: a `transformers.Trainer` of a causal language model, or a `trl.SFTTrainer`.
            host: the kind of trainer, where an integration brings one; None finds it by the trainer's class.

        Raises:
            RuntimeError: already attached to this trainer.
            TypeError: another trainer.
            ValueError: a set-up that cannot work, with what to change.
        """
        for run in self.runs_on(trainer):
            if run.hooked:
                raise RuntimeError(f"This {type(self).__name__} is already attached to the trainer; detach() it first.")
            run.leave()
        place = (host or host_class(trainer, type(self).__name__))(trainer, self)
        place.check()
        self._check_once(trainer)
        for other in trainer.callback_handler.callbacks:
            same = isinstance(other, AuxiliaryLossCallback) and other is not self and other.name == self.name
            if same and other.runs_on(trainer):
                raise UserValueError(
                    f"A callback named {self.name!r} is already attached to this trainer; give one of the two another "
                    f"name, for example name='{self.name}_2', so that their metrics stay apart."
                )
        decide = place.sample_language()
        self.runs.add(AttachedRun(place, self.prepare(trainer), decide))
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def detach(self) -> None:
        """Leave every trainer for good: hooks, methods, list of callbacks. Training goes on without the term."""
        for run in list(self.runs):
            if not run.removed:
                run.trainer.remove_callback(self)
            if not run.training:  # or else its train() cleans up
                run.leave()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or an object read back from a pickle, is attached to nothing."""
        return {name: value for name, value in vars(self).items() if name != "runs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, runs=WeakSet())

    def runs_on(self, trainer: Trainer) -> list[AttachedRun]:
        """This callback's run on a trainer, if there is one."""
        return [run for run in self.runs if run.trainer is trainer]

    def captures_on(self, trainer: Trainer) -> list[LayerCapture]:
        """The captures of all auxiliary losses on a trainer."""
        callbacks = [other for other in trainer.callback_handler.callbacks if isinstance(other, AuxiliaryLossCallback)]
        return [run.loss.capture for other in callbacks for run in other.runs_on(trainer)]

    def _running(self, state: TrainerState) -> AttachedRun:
        """The run of the trainer that an event comes from, which transformers identifies by its state alone."""
        for run in self.runs:
            if run.trainer.state is state and run.hooked:
                return run
        raise RuntimeError(
            f"{type(self).__name__} is among the callbacks of this trainer but not attached to it: it was added with "
            "trainer.add_callback after the trainer had been made, and a callback learns which trainer it is in only "
            "while that is made. Use callback.attach(trainer), or give it to the trainer's callbacks=[...]."
        )

    def _check_once(self, trainer: Trainer) -> None:
        if sum(other is self for other in trainer.callback_handler.callbacks) > 1:
            raise UserValueError(f"This {type(self).__name__} is in the trainer's callbacks twice; give it once.")

    # Events of the trainer

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = calling_trainer(self)
        if not any(run.hooked for run in self.runs_on(trainer)):  # an integration may just have attached it
            self.attach(trainer)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        run = self._running(state)
        self._check_once(run.trainer)
        run.loss.begin()
        run.restart()
        check_resumed(state, f"qscope_posttrain/{self.name}", {**self.identity(), **run.loss.identity()})

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        run = self._running(state)
        run.count_step()
        if control.should_log or control.should_training_stop:
            run.flush()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log:
            self._running(state).flush()
