"""Read a handful of features out of the residual stream, without a copy of it in a wider dtype.

f[t, s] = x[t] . rows[s] + bias[s]                          [T, F], in at least fp32
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.kernels.checks import check_floating, check_same_device, check_shape, exact_dtype

TILE_TOKENS = 1024
"""Tokens of a half-precision x that are widened at a time on the CPU."""

HANDFUL = 256
"""Rows up to which CUDA takes the kernel that reads x in its own dtype, once for every 64 of them; for more of them a
library's matrix product of widened tiles is the better choice."""


def feature_preactivations(x: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    """`x @ rows.T + bias` with products and sums in at least fp32, whatever autocast or tf32 setting is active.

    Args:
        x: `[..., D]`, any floating dtype and any strides.
        rows: `[F, D]`, floating point.
        bias: `[F]`.

    Returns:
        `[..., F]`, fp32, or fp64 where x or rows are.

    Differentiable with respect to all three. Saves `rows`; and x only if `rows` requires a gradient. Beside the result
    a half-precision x takes one tile of `[1024, D]` fp32, on CUDA only beyond 256 rows, and half-precision rows an fp32
    copy. Where fp32 products are lowered (tf32, bf16), the CPU multiplies in fp64. Deterministic.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    check_rows(x, rows, bias)
    flat: Tensor = _feature_preactivations(x.reshape(-1, x.shape[-1]), rows, bias)
    return flat.view(*x.shape[:-1], rows.shape[0])


def check_rows(x: Tensor, rows: Tensor, bias: Tensor) -> None:
    """x [..., D], rows [F, D], bias [F], floating point, on one device."""
    check_shape("rows", rows, ("features", "d_model"))
    check_shape("bias", bias, (rows.shape[0],))
    if x.ndim == 0 or x.shape[-1] != rows.shape[1]:
        raise ValueError(f"x must be [..., {rows.shape[1]}] for rows {list(rows.shape)}, got {list(x.shape)}")
    check_floating(x=x, rows=rows, bias=bias)
    check_same_device(x=x, rows=rows, bias=bias)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if one of them is, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


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
        from qscope_posttrain.kernels.triton.readout import preactivations

        return preactivations(x, rows, bias)
    readout = x.new_empty(x.shape[0], rows.shape[0], dtype=exact)
    weight, offset = rows.to(exact).t(), bias.to(exact)
    with torch.autocast(x.device.type, enabled=False):
        for tokens, tile in token_tiles(x, exact):
            torch.addmm(offset, tile, weight, out=readout[tokens])
    return readout.to(wide)


@torch.library.custom_op("qscope_posttrain::feature_preactivations_gradient", mutates_args=())
def input_gradient(gradient: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient @ rows`, `[T, D]`, summed in the gradient's dtype and stored in `dtype`."""
    if gradient.is_cuda and gradient.dtype == torch.float32:
        from qscope_posttrain.kernels.triton.readout import spread

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


@_feature_preactivations.register_fake
def _(x: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], rows.shape[0], dtype=accumulation_dtype(x, rows))


@input_gradient.register_fake
def _(gradient: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape[0], rows.shape[1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, rows, bias = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, rows)
    ctx.dtypes = x.dtype, bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
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


_feature_preactivations.register_autograd(_backward, setup_context=_setup_context)
