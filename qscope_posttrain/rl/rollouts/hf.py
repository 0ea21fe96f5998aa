"""Generate a batch with the model's own `generate`, some of its rows as negatives.

The generation is watched token by token, and the distribution of the next one changed where a row has to repeat itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.layers import pretrained_model, unwrapped
from qscope_posttrain.models.steering import Window, other_rows, steer
from qscope_posttrain.rl.rollouts.copying import CopyRule
from qscope_posttrain.rl.rollouts.negatives import NegativeSource, planned_steering
from qscope_posttrain.rl.rollouts.options import check_trainer_generation
from qscope_posttrain.rl.rows import RowPlan


class GenerationTap:
    """The tokens that some rows generated, and the log-probabilities with which they were drawn.

    Both are kept on the model's device; nothing waits for the host while the model generates.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._tokens: list[Tensor] = []
        self._logps: list[Tensor] = []
        self._next: Tensor | None = None
        self.reads_everything_again = False
        """Whether a forward after the first read more than one token: the model generates without a cache."""

    @property
    def steps(self) -> int:
        """Generated tokens that the model has read so far."""
        return len(self._tokens)

    def read(self, tokens: Tensor) -> None:
        """Take note of the token `[rows]` that was drawn from the last distribution."""
        if self._next is not None:
            self._logps.append(self._next.gather(1, tokens[:, None]).squeeze(1))
        self._tokens.append(tokens)

    def predict(self, logits: Tensor) -> None:
        """Take note of the distribution `[rows, vocabulary]` of the next token."""
        self._next = torch.log_softmax(logits.float() / self._temperature, dim=-1)

    def check_tokens(self, completion_ids: Tensor, completion_mask: Tensor) -> None:
        """RuntimeError unless the tapped rows are those that came out of the generation, both [rows, length]."""
        width = min(len(self._tokens), completion_ids.shape[1])
        if width == 0:
            return
        said = torch.stack(self._tokens[:width], dim=1).to(completion_ids.device)
        if bool(((said != completion_ids[:, :width]) & completion_mask[:, :width].bool()).any()):
            raise RuntimeError(
                "Negatives came out as other rows than those that were made negatives: the generation has put the rows "
                "of the batch in another order, or wrote into them. Negatives need the model's own `generate`."
            )

    def log_probabilities(self, completion_ids: Tensor) -> Tensor:
        """[rows, length] of the tokens `completion_ids` [rows, length] under the distribution they were drawn from.

        It is that of the temperature alone, before top-k, top-p and penalties, as the trainer's own log-probabilities
        are. Columns that were never generated are 0.
        """
        logps = list(self._logps)
        if self._next is not None and len(logps) < completion_ids.shape[1]:
            # The last token of the longest row is never read back.
            last = completion_ids[:, len(logps)].to(self._next.device)
            logps.append(self._next.gather(1, last[:, None]).squeeze(1))
        result = torch.zeros(completion_ids.shape, dtype=torch.float32, device=completion_ids.device)
        if logps:
            known = torch.stack(logps, dim=1)[:, : completion_ids.shape[1]]
            result[:, : known.shape[1]] = known.to(result.device)
        return result


@contextmanager
def generation_tap(
    model: nn.Module,
    rows: Tensor,
    temperature: float,
    rule: CopyRule | None = None,
    batch_rows: int | None = None,
) -> Iterator[GenerationTap]:
    """Tap rows `rows` (their numbers in the batch) of what `model.generate` does inside the block.

    With a `rule`, the logits of these rows are replaced by its own; the other rows stay bit-identical.

    Args:
        batch_rows: rows of the batch; None takes any number.

    Raises:
        ValueError: in a forward over another number of rows.
        RuntimeError: on exit without another exception, if the model never ran.
    """
    causal_lm = pretrained_model(model)
    index = rows.to(causal_lm.device)
    tap = GenerationTap(temperature)
    forwards = 0

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The first forward reads the prompt; each later one reads the token that was just drawn.
        if forwards:
            tap.reads_everything_again |= kwargs["input_ids"].shape[1] > 1
            token = kwargs["input_ids"][index, -1]
            tap.read(token)
            if rule is not None:
                rule.read(token)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal forwards
        forwards += 1
        if batch_rows is not None and output.logits.shape[0] != batch_rows:
            raise UserValueError(other_rows("Negatives are chosen", batch_rows, output.logits.shape[0]))
        logits = output.logits[index, -1]
        if rule is not None:
            logits = rule(tap.steps, logits)
            # A copy: the caller's rows keep their bits, and a compiled graph its buffer.
            changed = output.logits.clone()
            changed[index, -1] = logits
            output.logits = changed
        tap.predict(logits)
        return output

    handles = [
        causal_lm.register_forward_pre_hook(before, with_kwargs=True),
        causal_lm.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()
    if not forwards:
        raise RuntimeError(
            "The model never ran while negatives were generated: another copy of it did. Steering cannot reach it."
        )


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
