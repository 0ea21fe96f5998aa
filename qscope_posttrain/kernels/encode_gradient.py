"""The backward pass of all sparse encoders: from a gradient on the kept entries to x, W_enc and b_enc.

With G [tokens, d_sae] holding g[t, j] at feature indices[t, j]: dL/dx = G W_enc, dL/dW_enc = G' x, dL/db_enc = G' 1.
These are the products of `sparse_decode` and of its backward, so nothing of [tokens, d_sae] or [tokens, k, d_model] is
made, and each is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from qscope_posttrain.kernels.decode import _sparse_decode, _weight_gradient


def encoder_gradients(
    gradient: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc and b_enc, each in the dtype of its tensor, None where not `needed`.

    `gradient` [tokens, width] is summed in its own dtype (float32 or float64) for W_enc and b_enc; for x it is rounded
    to the dtype of W_enc, as the rows are.
    """
    for_x = for_W = for_b = None
    if needed[0]:
        for_x = _sparse_decode(gradient, indices, W_enc, None).to(x.dtype)
    if needed[1]:
        for_W = _weight_gradient(x.to(gradient.dtype), gradient, indices, W_enc.shape[0]).to(W_enc.dtype)
    if needed[2]:
        ones = gradient.new_ones(x.shape[0], 1)
        for_b = _weight_gradient(ones, gradient, indices, W_enc.shape[0]).squeeze(1).to(W_enc.dtype)
    return for_x, for_W, for_b


def register_gradient(op: Any, relu: Callable[[tuple[Any, ...]], bool]) -> None:
    """Register the backward pass of an encoder: a custom op (x, W_enc, b_enc, ...) -> (values, indices, ...).

    `relu(inputs)` tells whether entries of value 0 are those that a ReLU cut off, and so get no gradient.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.relu = relu(inputs)
        ctx.save_for_backward(inputs[0], inputs[1], output[0], output[1])

    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, W_enc, values, indices = ctx.saved_tensors
        if ctx.relu:
            gradient = gradient * (values > 0)
        needed = ctx.needs_input_grad
        return *encoder_gradients(gradient, indices, x, W_enc, needed[:3]), *[None] * (len(needed) - 3)

    op.register_autograd(backward, setup_context=setup_context)
