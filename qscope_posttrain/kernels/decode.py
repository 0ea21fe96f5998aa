"""Sum decoder rows by a sparse code, without a dense code and without a tensor [tokens, width, d_model].

All three directions are sums of rows by a sparse matrix A [tokens, d_sae]: the forward is A W_dec, the gradient of
W_dec is A' g with the entries sorted by feature, and that of the values is the part of g W_dec' where A has entries.

The backward pass of the encoders is made of the same sums (`register_encoder_gradient`). With G [tokens, d_sae] holding
the gradient g[t, j] at feature indices[t, j]: dL/dx = G W_enc, dL/dW_enc = G' x, dL/db_enc = G' 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qscope_posttrain.kernels.checks import check_floating, check_indices, check_same, check_shape

DENSE_BELOW = 16  # CPU backward: dense product up to this d_sae / k: 1.5 times faster at 8, 1.7 times slower at 32
TILE_ELEMENTS = 1 << 20  # Elements of a dense code held at a time there: 4 MiB in float32
INT32_ENTRIES = 2**31 - 1


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """`sum_j values[t, j] * W_dec[indices[t, j]] + b_dec`.

    Args:
        values: `[T, w]`, floating point; rounded to the dtype of `W_dec`.
        indices: `[T, w]`, int32 or int64, each in `[0, S)`; an index may occur several times in a row. Out of range is
            an error on the CPU; on CUDA it is not checked, because that would wait for the device.
        W_dec: `[S, D]`.
        b_dec: `[D]` in the dtype of `W_dec`, or None.

    Returns:
        `[T, D]` in the dtype of `W_dec`, accumulated in at least fp32. With w = 0 it is `b_dec` in every row.

    Differentiable with respect to `values`, `W_dec` and `b_dec`; saves `values` and `indices`. The gradient of `W_dec`
    is dense, `[S, D]`, and takes a sort of the T * w entries by feature (about 24 bytes per entry). Deterministic at a
    given number of threads: sums are made in a fixed order, never by atomics. Not affected by autocast.
    """
    check_shape("W_dec", W_dec, ("d_sae", "d_model"))
    check_shape("values", values, ("tokens", "width"))
    check_shape("indices", indices, tuple(values.shape))
    check_indices("indices", indices)
    check_floating(values=values, W_dec=W_dec)
    check_same("device", values=values, indices=indices, W_dec=W_dec)
    if b_dec is not None:
        check_shape("b_dec", b_dec, (W_dec.shape[1],))
        check_same("dtype", W_dec=W_dec, b_dec=b_dec)
        check_same("device", W_dec=W_dec, b_dec=b_dec)
    if W_dec.shape[0] == 0 and values.numel() > 0:
        raise ValueError("W_dec has no rows, but the code has entries")
    decoded: Tensor = _sparse_decode(values, indices, W_dec, b_dec)
    return decoded


@torch.library.custom_op("qscope_posttrain::sparse_decode", mutates_args=())
def _sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    tokens = values.shape[0]
    if values.is_cuda:
        from qscope_posttrain.kernels.triton.decode import sum_rows

        weights = values.to(W_dec.dtype).reshape(-1)
        return sum_rows(weights, indices.reshape(-1), W_dec, segments=tokens, bias=b_dec)
    if values.numel() == 0 or W_dec.shape[1] == 0:
        decoded = W_dec.new_zeros(tokens, W_dec.shape[1])
    else:
        flat, starts = _bags(indices)
        decoded = _sum_rows(values.reshape(-1), flat, starts, W_dec)
    return decoded if b_dec is None else decoded.add_(b_dec)


@torch.library.custom_op("qscope_posttrain::sparse_decode_values_gradient", mutates_args=())
def _values_gradient(gradient: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """`gradient[t] . W_dec[indices[t, j]]`, `[T, w]` in the dtype of W_dec."""
    if gradient.is_cuda:
        from qscope_posttrain.kernels.triton.decode import dot_rows_

        dots = W_dec.new_empty(indices.shape)
        dot_rows_(dots, gradient, indices, W_dec)
        return dots
    if indices.numel() == 0 or W_dec.shape[1] == 0:
        return W_dec.new_zeros(indices.shape)
    tokens, width = indices.shape
    if _dense_is_cheaper(indices, W_dec, len(W_dec)):
        dots = W_dec.new_empty(tokens, width)
        with torch.autocast("cpu", enabled=False):
            for part in _tiles(tokens, len(W_dec)):
                dots[part] = (gradient[part] @ W_dec.t()).gather(1, indices[part].long())
        return dots
    flat, starts = _bags(indices)
    owners = torch.arange(tokens, device=flat.device, dtype=flat.dtype).repeat_interleave(width)
    # The kernel behind embedding_bag's own backward: a dot product per entry, nothing gathered.
    found: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        gradient.contiguous(), W_dec.contiguous(), flat, starts, owners, 0, -1
    )
    return found.view(tokens, width)


@torch.library.custom_op("qscope_posttrain::sparse_decode_weight_gradient", mutates_args=())
def _weight_gradient(gradient: Tensor, values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """`sum over entries of feature s of values[t, j] gradient[t]`, `[d_sae, D]` in the dtype of the gradient."""
    if indices.numel() == 0 or gradient.shape[1] == 0:
        return gradient.new_zeros(d_sae, gradient.shape[1])
    if _dense_is_cheaper(indices, gradient, d_sae):
        summed = gradient.new_zeros(d_sae, gradient.shape[1])
        with torch.autocast("cpu", enabled=False):
            for part in _tiles(len(indices), d_sae):
                code = gradient.new_zeros(len(indices[part]), d_sae)
                code.scatter_add_(1, indices[part].long(), values[part].to(code.dtype))
                summed.addmm_(code.t(), gradient[part])
        return summed
    features, order = indices.reshape(-1).sort(stable=True)
    bounds = torch.searchsorted(features, torch.arange(d_sae + 1, device=features.device, dtype=features.dtype))
    weights, tokens = values.reshape(-1)[order].to(gradient.dtype), order // indices.shape[1]
    if gradient.is_cuda:
        from qscope_posttrain.kernels.triton.decode import sum_rows

        return sum_rows(weights, tokens, gradient, segments=d_sae, starts=bounds)
    return _sum_rows(weights, tokens, bounds[:-1], gradient)


def _dense_is_cheaper(indices: Tensor, matrix: Tensor, d_sae: int) -> bool:
    """Whether to go through a dense code [tokens, d_sae]; in half precision the tiles' sums would be rounded."""
    wide = matrix.dtype in (torch.float32, torch.float64)
    return indices.device.type == "cpu" and wide and d_sae <= DENSE_BELOW * indices.shape[1]


def _tiles(tokens: int, d_sae: int) -> Iterator[slice]:
    step = max(1, TILE_ELEMENTS // d_sae)
    return (slice(start, start + step) for start in range(0, tokens, step))


def _bags(indices: Tensor) -> tuple[Tensor, Tensor]:
    """(flat indices, where each token's begin), both int64 where int32 would overflow."""
    flat, width = indices.reshape(-1), indices.shape[1]
    if flat.numel() > INT32_ENTRIES:
        flat = flat.long()
    return flat, torch.arange(0, flat.numel(), width, device=flat.device, dtype=flat.dtype)


def _sum_rows(weights: Tensor, rows: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """`sum of weights[n] table[rows[n]]` over each segment that begins at `starts`: `[segments, D]`."""
    return F.embedding_bag(
        rows, table.contiguous(), starts.to(rows.dtype), mode="sum", per_sample_weights=weights.to(table.dtype)
    )


_sparse_decode.register_fake(lambda values, _, W_dec, b_dec: W_dec.new_empty(values.shape[0], W_dec.shape[1]))
_values_gradient.register_fake(lambda gradient, indices, W_dec: W_dec.new_empty(indices.shape))
_weight_gradient.register_fake(lambda gradient, values, indices, d_sae: gradient.new_empty(d_sae, gradient.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, W_dec, _ = inputs
    ctx.save_for_backward(values, indices, W_dec)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, W_dec = ctx.saved_tensors
    needs_values, _, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        _values_gradient(gradient, indices, W_dec).to(values.dtype) if needs_values else None,
        None,
        _weight_gradient(gradient, values, indices, W_dec.shape[0]) if needs_weight else None,
        gradient.sum(0) if needs_bias else None,
    )


_sparse_decode.register_autograd(_backward, setup_context=_setup_context)


def register_encoder_gradient(op: Any, relu: Callable[[tuple[Any, ...]], bool]) -> None:
    """Register the backward pass of an encoder: a custom op (x, W_enc, b_enc, ...) -> (values, indices, ...).

    `relu(inputs)`: whether entries of value 0 are those that a ReLU cut off, and so get no gradient. Sums for W_enc and
    b_enc are in the gradient's dtype (float32 or float64); for x it is rounded to the dtype of W_enc, as the rows are.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.relu = relu(inputs)
        ctx.save_for_backward(inputs[0], inputs[1], output[0], output[1])

    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, W_enc, values, indices = ctx.saved_tensors
        needs_x, needs_W, needs_b, *others = ctx.needs_input_grad
        gradient = gradient * (values > 0) if ctx.relu else gradient
        of_x = of_W = of_b = None
        if needs_x:
            of_x = _sparse_decode(gradient, indices, W_enc, None).to(x.dtype)
        if needs_W:
            of_W = _weight_gradient(x.to(gradient.dtype), gradient, indices, W_enc.shape[0]).to(W_enc.dtype)
        if needs_b:
            ones = gradient.new_ones(x.shape[0], 1)
            of_b = _weight_gradient(ones, gradient, indices, W_enc.shape[0]).squeeze(1).to(W_enc.dtype)
        return of_x, of_W, of_b, *(None for _ in others)

    op.register_autograd(backward, setup_context=setup_context)
