"""Sparse codes of a batch under each architecture, differentiable, through the operators of `kernels`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.distributed import Reduce, alone, gathered
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.kernels import batch_topk_encode, sparse_decode, threshold_encode, topk_encode
from qscope_posttrain.sae.training.parameters import Parameters


@dataclass(frozen=True, eq=False)
class Code:
    """Which latents fire on a batch, and what an estimator needs beside."""

    values: Tensor
    """[tokens, width] fp32; entries of value 0 only fill the rectangle"""
    indices: Tensor
    """[tokens, width] int32"""
    fires: Tensor | None = None
    """jumprelu: [tokens, width], 1 where a latent fires, with an estimated gradient to the thresholds"""


def topk_code(z: Tensor, parameters: Parameters, k: int) -> Code:
    """The k largest positive pre-activations of each token (Gao et al. 2024, arXiv 2406.04093, equation 2)."""
    return Code(*topk_encode(z, parameters.W_enc, parameters.b_enc, k))


def batch_topk_code(z: Tensor, parameters: Parameters, k: int, tokens: int, reduce: Reduce) -> Code:
    """The k x `tokens` largest positive pre-activations of the batch (Bussmann et al. 2024, arXiv 2412.06410).

    `tokens` counts the batch on all processes, of which `z` [own tokens, d_model] is this one's share. What is among
    the largest of all is among the largest of one's own; the smallest that counts is found over all processes.
    """
    if reduce is alone:
        return Code(*batch_topk_encode(z, parameters.W_enc, parameters.b_enc, k))
    most = min(math.ceil(k * tokens / max(len(z), 1)), parameters.W_enc.shape[0])
    values, indices = batch_topk_encode(z, parameters.W_enc, parameters.b_enc, most)
    everywhere = gathered(values.detach()[values > 0], reduce)
    if everywhere.numel() > k * tokens:
        least = everywhere.topk(k * tokens, sorted=True).values[-1]
        values = torch.where(values >= least, values, 0.0)
    return Code(values, indices)


def smallest_positive(values: Tensor, reduce: Reduce) -> Tensor:
    """The smallest value above 0 on all processes, []; infinite if there is none."""
    least = torch.where(values > 0, values, math.inf).amin() if values.numel() else values.new_tensor(math.inf)
    return least if reduce is alone else gathered(least.reshape(1), reduce).amin()


def jumprelu_code(z: Tensor, parameters: Parameters, bandwidth: float) -> Code:
    """Pre-activations above their latent's threshold, with straight-through gradients to the thresholds.

    f = v H(v - t) and the number of latents that fire, sum H(v - t), have no useful gradient to a threshold t. With the
    rectangle K(u) = 1 for |u| < 1/2 it is estimated (Rajamanoharan et al. 2024, arXiv 2407.14435, equations 11 and 12):

        df/dt = -(t / bandwidth) K((v - t) / bandwidth)        dH/dt = -(1 / bandwidth) K((v - t) / bandwidth)

    Both need the entries within half a bandwidth of the threshold only, so the code is read down to there, and no dense
    [tokens, d_sae] matrix is made. A pre-activation of 0 or below counts as outside the window.
    """
    if parameters.log_threshold is None:
        raise UserValueError("these parameters have no thresholds: they are not those of a JumpReLU dictionary")
    threshold = parameters.log_threshold.exp()
    lowest = (threshold.detach() - bandwidth / 2).clamp_min(0.0)
    values, indices = threshold_encode(z, parameters.W_enc, parameters.b_enc, lowest)
    # A gather whose gradient is summed in a fixed order on every device.
    ones = torch.ones_like(values).reshape(-1, 1)
    at = sparse_decode(ones, indices.reshape(-1, 1), threshold[:, None]).view_as(values)
    code, fires = _Jump.apply(values, at, bandwidth)
    return Code(code, indices, fires)


class _Jump(torch.autograd.Function):
    """(v H(v - t), H(v - t)) and the estimated gradients of both."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        fires = values > threshold
        ctx.save_for_backward(values, threshold, fires)
        ctx.bandwidth = bandwidth
        return torch.where(fires, values, 0.0), fires.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, of_code: Tensor, of_fires: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        values, threshold, fires = ctx.saved_tensors
        window = ((values - threshold).abs() < ctx.bandwidth / 2) & (values > 0)
        estimate = -(threshold * of_code + of_fires) / ctx.bandwidth
        return torch.where(fires, of_code, 0.0), torch.where(window, estimate, 0.0), None
