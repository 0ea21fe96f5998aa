"""Stop a training well: on a signal, with a checkpoint, or where weights are not finite; and find where it goes on."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from qscope_posttrain.errors import UserError, UserOSError, UserValueError, finite_probabilities, naming_what_is_kept
from qscope_posttrain.files import read_json
from qscope_posttrain.report.progress import status
from qscope_posttrain.sae.download import in_words

STATE = "trainer_state.json"
"""The file of a checkpoint that is written last"""
_CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_CANNOT_WRITE_WORDS = ("I/O error", "iostream error", "PytorchStreamWriter", "inline_container.cc")
"""How safetensors and torch say it"""
SAME_SIGNAL = 5.0
"""Seconds within which signals are taken for one: a terminal or Slurm sends it to all processes, and the launcher among
them sends it on"""


def last_checkpoint(output: Path, say: bool = False) -> Path | None:
    """The newest checkpoint in `output` that was written to its end. With `say`, newer ones that were not are named."""
    folders = [folder for folder in output.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdecimal()]
    for folder in sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), reverse=True):
        try:
            read_json(folder / STATE)
        except (OSError, UserError):
            if say:
                status(f"'{folder}' was not written to its end ({STATE} cannot be read): passed over")
            continue
        return folder
    return None


@contextmanager
def failures_in_words(output: Path) -> Iterator[None]:
    """Say what failed where a checkpoint cannot be written or a worker of the data loader died, and with every error
    from which checkpoint to go on."""
    with naming_what_is_kept(lambda: _kept(output)), finite_probabilities():
        try:
            yield
        except Exception as error:
            reason = str(error)
            if getattr(error, "errno", None) in _CANNOT_WRITE or any(words in reason for words in _CANNOT_WRITE_WORDS):
                free = in_words(shutil.disk_usage(output).free)
                raise UserOSError(f"cannot write a checkpoint in '{output}', with {free} free ({reason}).") from error
            if "DataLoader worker" in reason:
                advice = "Often memory is short: take fewer dataloader_num_workers"
                raise UserOSError(f"a process that reads the data has died ({reason}). {advice}.") from error
            raise


def _kept(output: Path) -> str:
    kept = last_checkpoint(output)
    if kept is None:
        return f"There is no checkpoint in '{output}'."
    return f"'{kept}' is the last checkpoint: go on with --resume_from_checkpoint last."


class FiniteWeights(TrainerCallback):
    """Ends a training whose weights or gradients are no numbers, before a checkpoint of it replaces a good one.
    transformers logs a loss of 0 where it is NaN (`logging_nan_inf_filter`), so that such a training looks well."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """ValueError where the norm of the gradient is NaN; with fp16 the scaler leaves such a step out."""
        if not args.fp16 and math.isnan(float((kwargs.get("logs") or {}).get("grad_norm", 0.0))):
            raise UserValueError(_message("the gradient is NaN", state))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """ValueError where a trained weight is not finite, before it is saved; each rank looks at its own shard."""
        if not control.should_save and state.global_step < state.max_steps:
            return
        named = {name: _shard(weight) for name, weight in kwargs["model"].named_parameters() if weight.requires_grad}
        finite = [shard.isfinite().all().to(args.device) for shard in named.values()]  # read in one transfer
        if finite and not bool(torch.stack(finite).all()):
            name, *others = [name for name, good in zip(named, finite, strict=True) if not good]
            what = f"{name} is not finite" + (f", and {len(others)} more" if others else "")
            raise UserValueError(_message(what, state))


class StopOnSignal(TrainerCallback):
    """Ends a training after the step in which a signal came, with a checkpoint unless `save_strategy` is "no"."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The number of the signal that ended the training"""
        self._came: int | None = None
        self._since = 0.0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal; a later one of its kind acts as if there were no handler."""
        if self._came != number:
            self._came, self._since = number, time.monotonic()
            os.write(2, b"stopping after this step; the same signal later stops at once\n")  # safe in a handler
        elif time.monotonic() - self._since > SAME_SIGNAL:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Stop all ranks after the same step, whichever of them got the signal."""
        came = self._came or 0
        if torch.distributed.is_initialized():
            # The trainer waits for the device in each step already, to filter NaN out of its log.
            flag = torch.tensor([came], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            came = int(flag.item())
        if came:
            self.signal = came
            control.should_training_stop, control.should_evaluate = True, False
            control.should_save = args.save_strategy != "no"
        return control


@contextmanager
def stop_on_signals() -> Iterator[StopOnSignal]:
    """Handle SIGTERM, which preempts a node, and SIGINT, Ctrl-C, by the callback given inside the block."""
    callback = StopOnSignal()
    before = {number: signal.signal(number, callback.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield callback
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _shard(weight: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this rank holds, under FSDP2 and ZeRO-3 too."""
    data = getattr(weight, "ds_tensor", weight).detach()
    local = getattr(data, "to_local", None)
    return data if local is None else local()


def _message(what: str, state: TrainerState) -> str:
    return (
        f"The training has diverged: {what} at step {state.global_step} or before. Nothing more is saved. Lower "
        "learning_rate or the weight of the auxiliary loss, set max_grad_norm, or train in another precision."
    )
