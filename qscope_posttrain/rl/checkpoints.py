"""Checkpoints that lie between two generation batches, so that a resumed run equals one that was not interrupted."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


def generation_window(args: Any) -> int:
    """Optimiser steps after which generation batches and steps end together.

    TRL generates every `steps_per_generation * num_iterations` micro-batches, counted from 0 again in a resumed run.
    """
    micro_batches = args.steps_per_generation * args.num_iterations
    return int(math.lcm(micro_batches, args.gradient_accumulation_steps) // args.gradient_accumulation_steps)


class SaveBetweenGenerations(TrainerCallback):
    """Puts off a checkpoint that falls inside a generation batch to the end of that batch.

    A run that resumes inside one would generate the rest of the batch anew, from a newer policy. The last checkpoint of
    a training is written where it falls, and so are all with `load_best_model_at_end`, which wants them beside the
    evaluations.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._due = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.window and state.is_world_process_zero:
            logger.warning(
                f"the checkpoint of step {state.global_step} lies inside a generation batch of {self.window} steps: "
                "the rest of that batch is generated anew, so that this run will not equal an uninterrupted one."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if args.load_best_model_at_end or state.global_step >= state.max_steps:
            return control
        inside = state.global_step % self.window != 0
        wanted = control.should_save or self._due
        if inside and control.should_save and state.is_world_process_zero:
            end = math.ceil(state.global_step / self.window) * self.window
            logger.info(f"the checkpoint of step {state.global_step} waits for the generation batch to end at {end}.")
        control.should_save = wanted and not inside
        self._due = wanted and inside
        return control
