"""The SASFT penalty as a function of tensors, and the divisor that makes a micro-batch's sum its share of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.kernels.penalty import masked_excess
from qscope_posttrain.sft.masks import IGNORED_LABEL, TokenBatch

if TYPE_CHECKING:
    from transformers import Trainer

Normalization = Literal["token_mean", "paper", "official"]


def sasft_loss(
    pre_activations: Tensor,
    thresholds: Tensor,
    mask: Tensor,
    normalization: Normalization = "token_mean",
    *,
    num_tokens: Tensor | int | None = None,
) -> Tensor:
    """The SASFT penalty of one layer; add the values of several layers, then multiply by the weight lambda.

    With m_t = 1 for a penalized token (a response token of a sample that is not in the target language), F features,
    N = `num_tokens`:

        S          = sum_t m_t sum_s ReLU(f_ts - alpha_ts)
        token_mean = S / (F max(N, 1))      mean over features
        paper      = S / max(N, 1)          sum over features
        official   = S / (F N + 1)

    "paper" is Eq. 26 of the Qwen-Scope report (arXiv 2605.11887) with both expectations taken over tokens:
    L_reduce = E_x sum_{s in S_L} ReLU(f_s(x) - alpha_j), so N counts the penalized tokens. "official" is the
    published code (github.com/Aatrox103/SASFT, train.py), per micro-batch: N counts all response tokens, those of
    the target language included.

    Args:
        pre_activations (Tensor): f, `[T, F]` (or `[..., F]`), of any floating dtype; computed in at least fp32.
        thresholds (Tensor): Alpha, `[T, F]`, or anything that broadcasts to it.
        mask (Tensor): m, `[T]`, bool.
        normalization (str, default "token_mean"): Which of the three.
        num_tokens (int or Tensor, default None): N. None: the number of penalized tokens, which is right for "paper"
            without accumulation; give the response tokens of the whole accumulation window over all ranks for
            "token_mean" inside a training loop, and the response tokens of the micro-batch for "official".

    Returns:
        A scalar; exactly 0 (with a graph) where no token is penalized.

    Raises:
        ValueError: an unknown normalization, or shapes that do not fit.

    Example:
        >>> f = torch.tensor([[3.0, 1.0], [5.0, 5.0]])  # two tokens, two features
        >>> qp.sasft_loss(f, torch.tensor([2.0, 2.0]), mask=torch.tensor([True, False]))
        tensor(0.5000)
    """
    if mask.shape != pre_activations.shape[:-1]:
        raise UserValueError(
            f"mask must have one entry per token, {list(pre_activations.shape[:-1])}, got {list(mask.shape)}."
        )
    wide = pre_activations if pre_activations.dtype == torch.float64 else pre_activations.float()
    excess = masked_excess(wide, thresholds, mask)
    count = mask.sum() if num_tokens is None else num_tokens
    return normalize(excess.sum(), features=excess.shape[-1], num_tokens=count, normalization=normalization)


def normalize(total: Tensor, *, features: int, num_tokens: Tensor | int, normalization: Normalization) -> Tensor:
    """Divide the summed excess S of one layer as `sasft_loss` defines it. No synchronization with the host."""
    count = torch.as_tensor(num_tokens, device=total.device)
    if normalization == "token_mean":
        return total / (features * count.clamp(min=1))
    if normalization == "paper":
        return total / count.clamp(min=1)
    if normalization == "official":
        return total / (features * count + 1)
    raise UserValueError(f"normalization must be one of {', '.join(get_args(Normalization))}, got {normalization!r}.")


@dataclass(frozen=True, eq=False)
class Normalizer:
    """Turns the sum S over one micro-batch into the term that is added to its loss.

    token_mean: S / (F N), N the trainer's `num_items_in_batch`: all tokens of the accumulation window and of all ranks
        that the cross-entropy counts. Tokens of the target language are among them, and add nothing to S. Where the
        cross-entropy is a mean over each micro-batch (`loss_is_scaled_for_ga=False`, or a model that accepts no
        `num_items_in_batch`), so is this, with the tokens of the micro-batch as N.
    paper: S / N, N the penalized tokens of the accumulation window and of all ranks.
    official: S / (F N + 1), N the response tokens of the micro-batch. The published trainer adds this mean once per
        micro-batch and does not divide it by their number, so that its weight grows with gradient accumulation.

    Where N counts all ranks the term is multiplied by their number, because DDP averages gradients over ranks.
    """

    normalization: Normalization
    num_tokens: Tensor
    factor: float
    logged: float
    """Factor that the trainer will still apply: below 1 where it divides by the number of accumulated micro-batches"""

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        normalization: Normalization,
        batch: TokenBatch,
        eligible: Tensor,
        num_items_in_batch: Tensor | int | None,
        eligible_in_window: Tensor | None,
    ) -> Normalizer:
        """The normalizer of one micro-batch with its penalized positions.

        `num_items_in_batch` is what the trainer passed to `compute_loss`; `eligible_in_window` is by `count_in_window`,
        None outside of a training loop.
        """
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # transformers >= 5.19
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or trainer.compute_loss_func is not None
        later = 1 if scaled else trainer.current_gradient_accumulation_steps
        ranks = data_parallel_size(trainer)
        if normalization == "official":
            return cls(normalization, batch.labeled().sum(), 1, 1 / later)
        if normalization == "paper":
            if eligible_in_window is None:
                return cls(normalization, eligible.sum(), 1, 1 / later)
            return cls(normalization, eligible_in_window, ranks * later, 1 / later)
        if num_items_in_batch is None or not scaled:
            # A mean over the micro-batch, then over micro-batches, unless the trainer divides by their number later.
            factor = later / trainer.current_gradient_accumulation_steps
            return cls(normalization, (batch.labels[..., 1:] != IGNORED_LABEL).sum(), factor, 1 / later)
        factor = ranks if trainer.args.average_tokens_across_devices else 1
        return cls(normalization, torch.as_tensor(num_items_in_batch, device=batch.labels.device), factor, 1 / later)

    def __call__(self, total: Tensor, features: int = 1) -> Tensor:
        """The share of a sum over `features` features, as the trainer's later averages need it."""
        count = self.num_tokens.to(total.device)
        share = normalize(total, features=features, num_tokens=count, normalization=self.normalization)
        return share if self.factor == 1 else share * self.factor


def count_in_window(trainer: Trainer, count: Tensor) -> Tensor:
    """This rank's count in an accumulation window, summed over the ranks that hold different data."""
    summed: Tensor = trainer.accelerator.reduce(count.to(trainer.accelerator.device), reduction="sum")
    tensor_parallel = trainer.get_tp_size()
    return summed if tensor_parallel == 1 else summed / tensor_parallel


def data_parallel_size(trainer: Trainer) -> int:
    """Ranks that hold different data: all, divided by the size of a tensor-parallel group."""
    return int(trainer.accelerator.num_processes // trainer.get_tp_size())
