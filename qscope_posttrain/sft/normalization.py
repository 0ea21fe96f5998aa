"""The divisor that makes a sum over one micro-batch its share of the step's loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Trainer

from qscope_posttrain.sft.attachment_checks import tensor_parallel_size
from qscope_posttrain.sft.loss import Normalization, normalise
from qscope_posttrain.sft.masks import IGNORED_LABEL, TokenBatch


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Turns the sum S over one micro-batch into the term that is added to its loss.

    token_mean: S / (F N), N the trainer's `num_items_in_batch`: all tokens of the accumulation window and of all ranks
        that the cross-entropy counts. Tokens of the target language are among them, and add nothing to S.
    paper: S / N, N the penalised tokens of the accumulation window and of all ranks.
    official: S / (F N + 1), N the response tokens of the micro-batch. The published trainer adds this mean once per
        micro-batch and does not divide it by their number, so that its weight grows with gradient accumulation.

    Where N counts all ranks the term is multiplied by their number, because DDP averages gradients over ranks.
    """

    normalization: Normalization
    num_tokens: Tensor
    factor: float
    logged: float
    """What the trainer will still multiply the term by: below 1 where it divides by the accumulated micro-batches"""

    def __call__(self, total: Tensor, features: int = 1) -> Tensor:
        """The normalised term of a sum over `features` features."""
        share = normalise(
            total, features=features, num_tokens=self.num_tokens.to(total.device), normalization=self.normalization
        )
        return share if self.factor == 1 else share * self.factor


def micro_batch_normaliser(
    trainer: Trainer,
    normalization: Normalization,
    batch: TokenBatch,
    eligible: Tensor,
    num_items_in_batch: Tensor | int | None,
    eligible_in_window: Tensor | None,
) -> Normaliser:
    """The normaliser of one micro-batch.

    Args:
        trainer: gives the number of ranks and how it treats accumulation.
        normalization: see `Normaliser`.
        batch: the micro-batch.
        eligible: its penalised positions, bool.
        num_items_in_batch: what the trainer passed to `compute_loss`.
        eligible_in_window: see `count_in_window`; None outside of a training loop.
    """
    device = batch.labels.device
    later = trainer.current_gradient_accumulation_steps if divides_later(trainer, num_items_in_batch) else 1
    if normalization == "official":
        return Normaliser(normalization, batch.labelled().sum(), 1, 1 / later)
    if normalization == "paper":
        if eligible_in_window is None:
            return Normaliser(normalization, eligible.sum(), 1, 1 / later)
        return Normaliser(normalization, eligible_in_window, data_parallel_size(trainer) * later, 1 / later)
    if num_items_in_batch is None:
        # A mean over the micro-batch; the trainer divides by the number of micro-batches later.
        return Normaliser(normalization, (batch.labels[..., 1:] != IGNORED_LABEL).sum(), 1, 1 / later)
    factor = data_parallel_size(trainer) if trainer.args.average_tokens_across_devices else 1
    return Normaliser(normalization, torch.as_tensor(num_items_in_batch, device=device), factor, 1 / later)


def count_in_window(trainer: Trainer, count: Tensor) -> Tensor:
    """This rank's count in an accumulation window, summed over the ranks that hold different data."""
    tensor_parallel = trainer.accelerator.num_processes // data_parallel_size(trainer)
    summed: Tensor = trainer.accelerator.reduce(count.to(trainer.accelerator.device), reduction="sum")
    return summed if tensor_parallel == 1 else summed / tensor_parallel


def data_parallel_size(trainer: Trainer) -> int:
    """Ranks that hold different data: all, divided by the size of a tensor-parallel group."""
    return trainer.accelerator.num_processes // tensor_parallel_size(trainer)


def divides_later(trainer: Trainer, num_items_in_batch: Tensor | int | None) -> bool:
    """Whether `training_step` will divide the returned loss by the number of accumulated micro-batches."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # transformers >= 5.19
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
            trainer.compute_loss_func is not None
        )
    return not scaled
