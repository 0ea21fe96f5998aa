"""Add directions to hidden states, each token by its own strengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.kernels.checks import accumulation_dtype, check_floating, check_same, check_shape


def steer_add(hidden: Tensor, directions: Tensor, strengths: Tensor) -> Tensor:
    """Compute `hidden[b, t] + sum_n strengths[b, t, n] * directions[n]` as a new tensor.

    Args:
        hidden: `[B, T, D]`, any floating dtype.
        directions: `[N, D]`, floating point, finite.
        strengths: `[B, T, N]` or anything that expands to it, floating point: one per row, position and direction.

    Returns:
        `[B, T, D]` in the dtype of `hidden`: the sum is made in at least fp32 and rounded once. A token whose strengths
        are all 0 keeps its entries bit for bit, also -0.0, NaN and Inf.

    Differentiable with respect to all three; saves directions and strengths. One launch on CUDA, and nothing of the
    size of `hidden` beside the result; one tensor `[B, T, D]` elsewhere. Deterministic. Not affected by autocast.
    """
    check_shape("hidden", hidden, ("rows", "tokens", "d_model"))
    check_shape("directions", directions, ("directions", hidden.shape[2]))
    check_floating(hidden=hidden, directions=directions, strengths=strengths)
    check_same("device", hidden=hidden, directions=directions, strengths=strengths)
    shape = (*hidden.shape[:2], directions.shape[0])
    try:
        expanded = strengths.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"strengths must expand to [rows, tokens, directions] = {list(shape)}, got {list(strengths.shape)}"
        ) from error
    steered: Tensor = _steer_add(hidden, directions, expanded)
    return steered


@torch.library.custom_op("qscope_posttrain::steer_add", mutates_args=())
def _steer_add(hidden: Tensor, directions: Tensor, strengths: Tensor) -> Tensor:
    if hidden.is_cuda:
        from qscope_posttrain.kernels.triton.steering import steer_add as on_cuda

        steered = torch.empty_like(hidden)
        on_cuda(hidden, directions, strengths, steered)
        return steered
    wide = accumulation_dtype(hidden)
    factors, vectors = strengths.to(wide), directions.to(wide)
    if len(vectors) == 1:
        shifted = torch.addcmul(hidden.to(wide), factors, vectors)
        chosen = strengths != 0
    else:
        with torch.autocast(hidden.device.type, enabled=False):
            shifted = (factors @ vectors).add_(hidden)
        chosen = strengths.any(-1, keepdim=True)
    # Not a shift by zero: that would turn -0.0 to 0.0.
    return torch.where(chosen, shifted.to(hidden.dtype), hidden)


_steer_add.register_fake(lambda hidden, directions, strengths: torch.empty_like(hidden))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    directions, strengths = ctx.saved_tensors
    needs_hidden, needs_directions, needs_strengths = ctx.needs_input_grad
    wide = accumulation_dtype(gradient)
    of_directions = of_strengths = None
    with torch.autocast(gradient.device.type, enabled=False):
        if needs_directions:
            flat = gradient.flatten(0, 1).to(wide)
            of_directions = (strengths.reshape(-1, strengths.shape[-1]).to(wide).t() @ flat).to(directions.dtype)
        if needs_strengths:
            of_strengths = (gradient.to(wide) @ directions.to(wide).t()).to(strengths.dtype)
    return gradient if needs_hidden else None, of_directions, of_strengths


_steer_add.register_autograd(_backward, setup_context=_setup_context)
