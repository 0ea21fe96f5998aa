"""Generate a batch with the model's own `generate`, some of its rows as negatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from qscope_posttrain.models.layers import unwrapped
from qscope_posttrain.models.steering import Window, steer
from qscope_posttrain.rl.rollouts.copying import CopyRule
from qscope_posttrain.rl.rollouts.generation_tap import GenerationTap, generation_tap
from qscope_posttrain.rl.rollouts.negatives import NegativeSource, planned_steering
from qscope_posttrain.rl.rollouts.options import check_trainer_generation
from qscope_posttrain.rl.rows import RowPlan


class TransformersEngine:
    """Negatives in the `generate` of the model that is trained."""

    def __init__(self, trainer: Any, source: NegativeSource) -> None:
        """ValueError for options of `generate` under which a negative would be none."""
        check_trainer_generation(trainer, steered=source.steering is not None)
        self._trainer, self._source = trainer, source

    @contextmanager
    def rollout(self, plan: RowPlan) -> Iterator[GenerationTap | None]:
        """See `Engine`."""
        if not bool(plan.negative.any()):
            yield None
            return
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        with negative_rollout(self._source, plan, model, self._trainer.temperature) as tap:
            yield tap


@contextmanager
def negative_rollout(
    source: NegativeSource, plan: RowPlan, model: nn.Module, temperature: float
) -> Iterator[GenerationTap]:
    """Inside the block, `model.generate` makes the rows of `plan` negatives and leaves the others bit-identical.

    Args:
        plan: which rows of the batch, at least one, and when.
        model: the model that generates, plain or wrapped.
        temperature: of the sampling, for the log-probabilities that the tap records.
    """
    model = unwrapped(model)
    rows, count = plan.negative.nonzero().squeeze(1), len(plan.negative)
    if source.is_boundary is not None:
        device = next(model.parameters()).device
        start = plan.start[rows].to(device)
        rule = CopyRule(source.is_boundary.to(device), start, source.copies, source.copy_length)
        with generation_tap(model, rows, temperature, rule, batch_rows=count) as tap:
            yield tap
    along = planned_steering(source, plan)
    if along is None:
        return
    window = Window(start=plan.start, length=source.window_length)
    steering = replace(along, positions=window, rows=plan.negative)
    # A batch whose rows all end with their first token is rare, but no fault.
    with (
        steer(model, steering, require_generated=False),
        generation_tap(model, rows, temperature, batch_rows=count) as tap,
    ):
        yield tap
    if tap.reads_everything_again:
        raise RuntimeError(
            "The model generated without a cache and read the whole text at every token, so that steering could not "
            "distinguish generated tokens from the prompt and did nothing. Leave use_cache on."
        )
