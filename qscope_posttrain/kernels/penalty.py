"""Pre-activations of a handful of features, and a penalty where they exceed a threshold, with one pass over x.

f[t, s] = x[t] . rows[s] + bias[s]                    in at least fp32, without a wider copy of x
e[t, s] = m[t] ReLU(f[t, s] - thresholds[group of t, s])
sums[s] = sum_t e[t, s]                               d sums[s] / d x[t] = 1[e[t, s] > 0] rows[s]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qscope_posttrain.kernels import checks
from qscope_posttrain.kernels.checks import accumulation_dtype, exact_dtype

TILE_TOKENS = 1024  # Tokens of a half-precision x that are widened at a time on the CPU
HANDFUL = 256
"""Rows up to which CUDA takes the kernel that reads x in its own dtype, once for every 64 of them; for more a library's
matrix product of widened tiles is better."""


def feature_preactivations(x: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    """Compute `x @ rows.T + bias` with products and sums in at least fp32, whatever autocast or tf32 setting is active.

    Args:
        x: `[..., D]`, any floating dtype and any strides.
        rows: `[F, D]`, floating point.
        bias: `[F]`.

    Returns:
        `[..., F]`, fp32, or fp64 where x or rows are.

    Differentiable with respect to all three; saves `rows`, and x only if `rows` requires a gradient. A half-precision x
    takes one tile of `[1024, D]` fp32, on CUDA only beyond 256 rows. Where fp32 products are lowered (tf32, bf16), the
    CPU multiplies in fp64. Deterministic.
    """
    check_rows(x, rows, bias)
    flat: Tensor = _feature_preactivations(x.reshape(-1, x.shape[-1]), rows, bias)
    return flat.view(*x.shape[:-1], rows.shape[0])


def check_rows(x: Tensor, rows: Tensor, bias: Tensor) -> None:
    checks.check_shape("rows", rows, ("features", "d_model"))
    checks.check_shape("bias", bias, (rows.shape[0],))
    if x.ndim == 0 or x.shape[-1] != rows.shape[1]:
        raise ValueError(f"x must be [..., {rows.shape[1]}] for rows {list(rows.shape)}, got {list(x.shape)}")
    checks.check_floating(x=x, rows=rows, bias=bias)
    checks.check_same("device", x=x, rows=rows, bias=bias)


def token_tiles(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, x of these tokens in `dtype`): all at once where that takes no copy."""
    step = max(len(x), 1) if x.dtype == dtype else TILE_TOKENS
    for start in range(0, len(x), step):
        yield slice(start, start + step), x[start : start + step].to(dtype)


@torch.library.custom_op("qscope_posttrain::feature_preactivations", mutates_args=())
def _feature_preactivations(x: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    wide = accumulation_dtype(x, rows)
    exact = exact_dtype(wide, x.device)
    if x.is_cuda and wide == torch.float32 and (rows.shape[0] <= HANDFUL or exact != wide):
        from qscope_posttrain.kernels.triton.penalty import preactivations

        return preactivations(x, rows, bias)
    found = x.new_empty(x.shape[0], rows.shape[0], dtype=exact)
    weight, offset = rows.to(exact).t(), bias.to(exact)
    with torch.autocast(x.device.type, enabled=False):
        for tokens, tile in token_tiles(x, exact):
            torch.addmm(offset, tile, weight, out=found[tokens])
    return found.to(wide)


@torch.library.custom_op("qscope_posttrain::feature_preactivations_gradient", mutates_args=())
def input_gradient(gradient: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient @ rows`, `[T, D]`, summed in the gradient's dtype and stored in `dtype`."""
    if gradient.is_cuda and gradient.dtype == torch.float32:
        from qscope_posttrain.kernels.triton.penalty import spread

        return spread(gradient, rows, dtype)
    exact = exact_dtype(gradient.dtype, gradient.device)
    wide = rows.to(exact)
    with torch.autocast(gradient.device.type, enabled=False):
        if dtype == gradient.dtype == exact:
            return gradient @ wide
        result = gradient.new_empty(gradient.shape[0], rows.shape[1], dtype=dtype)
        for start in range(0, len(gradient), TILE_TOKENS):
            tokens = slice(start, start + TILE_TOKENS)
            result[tokens].copy_(gradient[tokens].to(exact) @ wide)
    return result


_feature_preactivations.register_fake(
    lambda x, rows, bias: x.new_empty(x.shape[0], rows.shape[0], dtype=accumulation_dtype(x, rows))
)
input_gradient.register_fake(
    lambda gradient, rows, dtype: gradient.new_empty(gradient.shape[0], rows.shape[1], dtype=dtype)
)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, rows, bias = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, rows)
    ctx.dtypes = x.dtype, bias.dtype


def _preactivations_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, rows = ctx.saved_tensors
    needs_x, needs_rows, needs_bias = ctx.needs_input_grad
    gradient_of_rows = None
    if needs_rows:
        exact = exact_dtype(gradient.dtype, gradient.device)
        gradient_of_rows = torch.zeros_like(rows, dtype=exact)
        with torch.autocast(gradient.device.type, enabled=False):
            for tokens, tile in token_tiles(x, exact):
                gradient_of_rows.addmm_(gradient[tokens].to(exact).t(), tile)
    return (
        input_gradient(gradient, rows, ctx.dtypes[0]) if needs_x else None,
        None if gradient_of_rows is None else gradient_of_rows.to(rows.dtype),
        gradient.sum(0).to(ctx.dtypes[1]) if needs_bias else None,
    )


_feature_preactivations.register_autograd(_preactivations_backward, setup_context=_save_rows)


class FeaturePenalty(NamedTuple):
    """Result of `feature_penalty`. Only `sums` has a gradient."""

    sums: Tensor  # [F] sum_t e_ts, fp32 (fp64 where x or rows are)
    above: Tensor  # `mask`'s shape, bool: where any feature exceeds its threshold


def feature_penalty(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    thresholds: Tensor,
    mask: Tensor,
    *,
    groups: Tensor | None = None,
) -> FeaturePenalty:
    """Sum the excess of each feature over its threshold, differentiable with respect to x.

    Args:
        x: `[..., D]`, any floating dtype; T tokens in all.
        rows, bias: `[F, D]` and `[F]`, see `feature_preactivations`. No gradient is taken through them.
        thresholds: `[G, F]` with `groups`, else `[F]`, or one row for each token, `[T, F]`.
        mask: `[...]`, bool: tokens that count. Others may hold anything, also NaN.
        groups: `[...]`, int32 or int64: the row of `thresholds` for each token. A negative one takes the first; such
            tokens should be masked.

    Products, sums and comparisons are in at least fp32, whatever autocast or tf32 setting is active. Saved for backward
    is a bool `[T, F]` beside rows, never x; a half-precision x is widened by tiles of 1024 tokens on the
    CPU and not at all on CUDA. Nothing waits for the device: scale the result (by a token count, say) with a
    device tensor. Deterministic. On CUDA two launches forward and one backward.
    """
    check_rows(x, rows, bias)
    _check_tokens(x, thresholds, mask, groups)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows, bias, thresholds)):
        raise ValueError("feature_penalty has no gradient for rows, bias and thresholds: detach() them.")
    thresholds, groups = _rows_of_thresholds(thresholds, groups, mask, rows.shape[0])
    flat = x.reshape(-1, x.shape[-1])
    sums, above, _ = _feature_penalty(flat, rows, bias, thresholds, groups, mask.reshape(-1))
    return FeaturePenalty(sums, above.view(mask.shape))


def masked_excess(pre_activations: Tensor, thresholds: Tensor, mask: Tensor) -> Tensor:
    """`m ReLU(f - threshold)`: `[..., F]` of f `[..., F]`, thresholds that broadcast to it, a bool mask `[...]`."""
    # Filled, not multiplied: a masked token may hold anything, and 0 * nan is nan.
    return torch.relu(pre_activations - thresholds).masked_fill(~mask.unsqueeze(-1), 0)


def _check_tokens(x: Tensor, thresholds: Tensor, mask: Tensor, groups: Tensor | None) -> None:
    for name, tensor in (("mask", mask), ("groups", groups)):
        if tensor is not None and tensor.shape != x.shape[:-1]:
            raise ValueError(f"{name} must have one entry per token, {list(x.shape[:-1])}, got {list(tensor.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    given = {"mask": mask, "thresholds": thresholds}
    if groups is not None:
        checks.check_indices("groups", groups)
        given["groups"] = groups
    checks.check_same("device", x=x, **given)


def _rows_of_thresholds(
    thresholds: Tensor, groups: Tensor | None, mask: Tensor, features: int
) -> tuple[Tensor, Tensor]:
    """(thresholds [G, F], groups [T]) for all three forms of thresholds."""
    if groups is not None:
        checks.check_shape("thresholds", thresholds, ("groups", features))
        return thresholds, groups.reshape(-1)
    if thresholds.ndim == 1:
        checks.check_shape("thresholds", thresholds, (features,))
        return thresholds.unsqueeze(0), mask.new_zeros(mask.numel(), dtype=torch.int32)
    checks.check_shape("thresholds", thresholds, (*mask.shape, features))
    return thresholds.reshape(-1, features), torch.arange(mask.numel(), device=mask.device)


@torch.library.custom_op("qscope_posttrain::feature_penalty", mutates_args=())
def _feature_penalty(
    x: Tensor, rows: Tensor, bias: Tensor, thresholds: Tensor, groups: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums [F], above [T], active [T, F])."""
    wide = accumulation_dtype(x, rows)
    if x.is_cuda and wide == torch.float32:
        from qscope_posttrain.kernels.triton.penalty import feature_penalty as on_cuda

        return on_cuda(x, rows, bias, thresholds, groups, mask)
    exact = exact_dtype(wide, x.device)
    rows, bias, thresholds = rows.to(exact).t(), bias.to(exact), thresholds.to(wide)
    sums = x.new_zeros(rows.shape[1], dtype=wide)
    active = mask.new_empty(x.shape[0], rows.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        for tokens, tile in token_tiles(x, exact):
            limit = thresholds[groups[tokens].clamp(min=0)]
            excess = masked_excess(torch.addmm(bias, tile, rows).to(wide), limit, mask[tokens])
            torch.gt(excess, 0, out=active[tokens])
            sums += excess.sum(0)
    return sums, active.any(-1), active


@torch.library.custom_op("qscope_posttrain::feature_penalty_gradient", mutates_args=())
def _penalty_gradient(gradient: Tensor, active: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum_s gradient[s] active[t, s] rows[s]`: `[T, D]` in `dtype`, summed in the gradient's."""
    if active.is_cuda and gradient.dtype == torch.float32:
        from qscope_posttrain.kernels.triton.penalty import spread

        return spread(active, rows, dtype, gradient)
    return input_gradient(active * gradient, rows, dtype)


@_feature_penalty.register_fake
def _(x: Tensor, rows: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, features, mask = x.shape[0], rows.shape[0], others[3]
    sums = x.new_empty(features, dtype=accumulation_dtype(x, rows))
    return sums, mask.new_empty(tokens), mask.new_empty(tokens, features)


_penalty_gradient.register_fake(
    lambda gradient, active, rows, dtype: gradient.new_empty(active.shape[0], rows.shape[1], dtype=dtype)
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, rows, *_ = inputs
    ctx.save_for_backward(output[2], rows)
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    of_x = None if gradient is None else _penalty_gradient(gradient, *ctx.saved_tensors, ctx.dtype)
    return of_x, *(None,) * 5


_feature_penalty.register_autograd(_backward, setup_context=_setup_context)
