"""How many groups hold negatives as training goes on, remembered in checkpoints."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class NegativeSchedule(TrainerCallback, ExportableState):
    """The share of groups with negatives: constant, falling linearly, and 0 for good once steering no longer loops.

    Its state lies in `trainer_state.json`, so that a resumed run goes on where the other stopped.
    """

    def __init__(
        self, share: float = 1.0, decay_steps: int = 0, stop_below: float = 0.0, stop_window: int = 64
    ) -> None:
        self.share = share
        self.decay_steps = decay_steps
        self.stop_below = stop_below
        self.stop_window = stop_window
        self.start()

    def start(self) -> None:
        """Forget what earlier trainings have seen."""
        self.recent: deque[bool] = deque(maxlen=self.stop_window)
        self.stopped_at: int | None = None

    def share_at(self, step: int) -> float:
        """Share of the groups that hold negatives in the batch generated at optimiser step `step`."""
        if self.stopped_at is not None:
            return 0.0
        if self.decay_steps:
            return self.share * max(0.0, 1.0 - step / self.decay_steps)
        return self.share

    def record(self, looped: Iterable[bool], step: int) -> None:
        """Take note of which negatives of a batch, of all processes in the order of their rows, became loops."""
        self.recent.extend(looped)
        full = len(self.recent) == self.stop_window
        # With stop_below = 0 no share is below it.
        if self.stopped_at is None and full and sum(self.recent) / self.stop_window < self.stop_below:
            self.stopped_at = step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the state of a checkpoint; `state` holds it when training resumes from one."""
        saved: Any = state.stateful_callbacks
        name = type(self).__name__
        if isinstance(saved, dict) and name in saved:
            attributes = saved[name]["attributes"]
            self.recent = deque(attributes["recent"], maxlen=self.stop_window)
            self.stopped_at = attributes["stopped_at"]
        elif isinstance(saved, dict):  # a checkpoint of GRPOTrainer; transformers wants a record to write to
            saved[name] = self.state()

    def state(self) -> dict[str, Any]:
        """JSON values that `transformers` writes into a checkpoint."""
        return {
            "args": {
                "share": self.share,
                "decay_steps": self.decay_steps,
                "stop_below": self.stop_below,
                "stop_window": self.stop_window,
            },
            "attributes": {"recent": list(self.recent), "stopped_at": self.stopped_at},
        }
