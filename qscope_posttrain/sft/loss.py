"""The SASFT penalty as plain functions of tensors, for the callback and for hand-written training loops."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.kernels.penalty import masked_excess

Normalization = Literal["token_mean", "paper", "official"]


def sasft_loss(
    pre_activations: Tensor,
    thresholds: Tensor,
    mask: Tensor,
    normalization: Normalization = "token_mean",
    *,
    num_tokens: Tensor | int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The SASFT penalty of one layer; add the values of several layers, then multiply by the weight lambda.

    With m_t = 1 for a penalised token (a response token of a sample that is not in the target language), w_t a
    position weight (1 unless given), F features, N = `num_tokens`:

        S          = sum_t m_t w_t sum_s ReLU(f_ts - alpha_ts)
        token_mean = S / (F max(N, 1))      mean over features
        paper      = S / max(N, 1)          sum over features
        official   = S / (F N + 1)

    "paper" is Eq. 26 of the Qwen-Scope report (arXiv 2605.11887) with both expectations taken over tokens:
    L_reduce = E_x sum_{s in S_L} ReLU(f_s(x) - alpha_j), so N counts the penalised tokens. "official" is the
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
        weights (Tensor, default None): w, `[T]`, for example risk weights; no gradient is taken through them.

    Returns:
        A scalar; exactly 0 (with a graph) where no token is penalised.

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
    excess = masked_excess(_at_least_fp32(pre_activations), thresholds, mask)
    if weights is not None:
        excess = excess * weights.detach().unsqueeze(-1)
    return normalise(
        excess.sum(),
        features=pre_activations.shape[-1],
        num_tokens=mask.sum() if num_tokens is None else num_tokens,
        normalization=normalization,
    )


def normalise(total: Tensor, *, features: int, num_tokens: Tensor | int, normalization: Normalization) -> Tensor:
    """Divide the summed excess S of one layer as `sasft_loss` defines it. No synchronisation with the host."""
    count = torch.as_tensor(num_tokens, device=total.device)
    if normalization == "token_mean":
        return total / (features * count.clamp(min=1))
    if normalization == "paper":
        return total / count.clamp(min=1)
    if normalization == "official":
        return total / (features * count + 1)
    raise UserValueError(f"normalization must be one of {', '.join(get_args(Normalization))}, got {normalization!r}.")


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
