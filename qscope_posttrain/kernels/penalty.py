"""Penalise a handful of features where they exceed a threshold: value and gradient with one pass over x.

e[t, s] = m[t] ReLU(x[t] . rows[s] + bias[s] - thresholds[group of t, s])
sums[s] = sum_t w[t] e[t, s]                          d sums[s] / d x[t] = w[t] 1[e[t, s] > 0] rows[s]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qscope_posttrain.kernels.checks import check_indices, check_same_device, check_shape, exact_dtype
from qscope_posttrain.kernels.readout import accumulation_dtype, check_rows, input_gradient, token_tiles


class FeaturePenalty(NamedTuple):
    """Result of `feature_penalty`. Only `sums` has a gradient."""

    sums: Tensor
    """[F] sum_t w_t e_ts, fp32 (fp64 where x or rows are)"""
    excesses: Tensor
    """[F] sum_t e_ts, the same without position weights"""
    above: Tensor
    """`mask`'s shape, bool: where any feature exceeds its threshold"""


def feature_penalty(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    thresholds: Tensor,
    mask: Tensor,
    *,
    groups: Tensor | None = None,
    weights: Tensor | None = None,
) -> FeaturePenalty:
    """Per-feature sums of the excess over a threshold, differentiable with respect to x.

    Args:
        x: `[..., D]`, any floating dtype; T tokens in all.
        rows, bias: `[F, D]` and `[F]`, see `feature_preactivations`. No gradient is taken through them.
        thresholds: `[G, F]` with `groups`, else `[F]`, or one row for each token, `[T, F]`.
        mask: `[...]`, bool: tokens that count. Others may hold anything, also NaN.
        groups: `[...]`, int32 or int64: the row of `thresholds` for each token. A negative one takes the first; such
            tokens should be masked.
        weights: `[...]`, floating: a factor for each token, without gradient; None for 1.

    Products, sums and comparisons are in at least fp32, whatever autocast or tf32 setting is active. Saved for backward
    is a bool `[T, F]` beside rows and weights, never x; a half-precision x is widened by tiles of 1024 tokens on the
    CPU and not at all on CUDA. Scale the result with a device tensor (a loss scale, a token count): it reaches the
    gradient as one, and nothing here waits for the device. Deterministic. On CUDA two launches forward (one reads x,
    one adds the blocks' sums in a fixed order) and one backward.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit, or rows that require a gradient.
    """
    check_rows(x, rows, bias)
    _check_tokens(x, thresholds, mask, groups, weights)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows, bias, thresholds)):
        raise ValueError("feature_penalty has no gradient for rows, bias and thresholds: detach() them.")
    thresholds, groups = _rows_of_thresholds(thresholds, groups, mask, rows.shape[0])
    sums, excesses, above, _ = _feature_penalty(
        x.reshape(-1, x.shape[-1]),
        rows,
        bias,
        thresholds,
        groups,
        mask.reshape(-1),
        # A masked token's weight may be anything, too.
        None if weights is None else weights.detach().masked_fill(~mask, 0).reshape(-1),
    )
    return FeaturePenalty(sums, excesses.detach(), above.view(mask.shape))


def masked_excess(pre_activations: Tensor, thresholds: Tensor, mask: Tensor) -> Tensor:
    """`m ReLU(f - threshold)`: `[..., F]` of f `[..., F]`, thresholds that broadcast to it, a bool mask `[...]`.

    Filled, not multiplied: a masked token may hold anything, and 0 * nan is nan.
    """
    return torch.relu(pre_activations - thresholds).masked_fill(~mask.unsqueeze(-1), 0)


def _check_tokens(x: Tensor, thresholds: Tensor, mask: Tensor, groups: Tensor | None, weights: Tensor | None) -> None:
    for name, tensor in (("mask", mask), ("groups", groups), ("weights", weights)):
        if tensor is not None and tensor.shape != x.shape[:-1]:
            raise ValueError(f"{name} must have one entry per token, {list(x.shape[:-1])}, got {list(tensor.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if groups is not None:
        check_indices("groups", groups)
    given = {"mask": mask, "thresholds": thresholds, "groups": groups, "weights": weights}
    check_same_device(x=x, **{name: tensor for name, tensor in given.items() if tensor is not None})


def _rows_of_thresholds(
    thresholds: Tensor, groups: Tensor | None, mask: Tensor, features: int
) -> tuple[Tensor, Tensor]:
    """(thresholds [G, F], groups [T]) for all three forms of thresholds."""
    if groups is not None:
        check_shape("thresholds", thresholds, ("groups", features))
        return thresholds, groups.reshape(-1)
    if thresholds.ndim == 1:
        check_shape("thresholds", thresholds, (features,))
        return thresholds.unsqueeze(0), mask.new_zeros(mask.numel(), dtype=torch.int32)
    check_shape("thresholds", thresholds, (*mask.shape, features))
    return thresholds.reshape(-1, features), torch.arange(mask.numel(), device=mask.device)


@torch.library.custom_op("qscope_posttrain::feature_penalty", mutates_args=())
def _feature_penalty(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    thresholds: Tensor,
    groups: Tensor,
    mask: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sums [F], excesses [F], above [T], active [T, F])."""
    wide = accumulation_dtype(x, rows)
    if x.is_cuda and wide == torch.float32:
        from qscope_posttrain.kernels.triton.penalty import feature_penalty as on_cuda

        return on_cuda(x, rows, bias, thresholds, groups, mask, weights)
    exact = exact_dtype(wide, x.device)
    rows, bias, thresholds = rows.to(exact).t(), bias.to(exact), thresholds.to(wide)
    excesses = x.new_zeros(rows.shape[1], dtype=wide)
    sums = torch.zeros_like(excesses)
    active = mask.new_empty(x.shape[0], rows.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        for tokens, tile in token_tiles(x, exact):
            limit = thresholds[groups[tokens].clamp(min=0)]
            excess = masked_excess(torch.addmm(bias, tile, rows).to(wide), limit, mask[tokens])
            torch.gt(excess, 0, out=active[tokens])
            excesses += excess.sum(0)
            if weights is not None:
                sums += weights[tokens].to(exact) @ excess.to(exact)
    return excesses.clone() if weights is None else sums, excesses, active.any(-1), active


@torch.library.custom_op("qscope_posttrain::feature_penalty_gradient", mutates_args=())
def _penalty_gradient(
    gradient: Tensor, active: Tensor, weights: Tensor | None, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """`sum_s gradient[s] w[t] active[t, s] rows[s]`: `[T, D]` in `dtype`, summed in the gradient's."""
    if active.is_cuda and gradient.dtype == torch.float32:
        from qscope_posttrain.kernels.triton.readout import spread_active

        return spread_active(gradient, active, weights, rows, dtype)
    coefficients = active * gradient
    if weights is not None:
        coefficients *= weights.to(gradient.dtype).unsqueeze(-1)
    return input_gradient(coefficients, rows, dtype)


@_feature_penalty.register_fake
def _(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    thresholds: Tensor,
    groups: Tensor,
    mask: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, features = x.shape[0], rows.shape[0]
    sums = x.new_empty(features, dtype=accumulation_dtype(x, rows))
    return sums, torch.empty_like(sums), mask.new_empty(tokens), mask.new_empty(tokens, features)


@_penalty_gradient.register_fake
def _(gradient: Tensor, active: Tensor, weights: Tensor | None, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(active.shape[0], rows.shape[1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, rows, *_, weights = inputs
    ctx.save_for_backward(output[3], weights, rows)
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    active, weights, rows = ctx.saved_tensors
    if gradient is None:
        return (None,) * 7
    return _penalty_gradient(gradient, active, weights, rows, ctx.dtype), *(None,) * 6


_feature_penalty.register_autograd(_backward, setup_context=_setup_context)
