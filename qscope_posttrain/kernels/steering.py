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


EDITS = 4
"""Directions that `steer_planned_` can add to one token."""


@torch.library.custom_op("qscope_posttrain::steer_planned", mutates_args=("hidden", "residual", "steered"))
def steer_planned_(hidden: Tensor, residual: Tensor | None, table: Tensor, plan: Tensor, steered: Tensor) -> None:
    """Add to each token of a flat batch the directions that a plan names for it, in place.

    The plan is read when the operator runs, so that a CUDA graph or a compiled graph follows what the buffer then says.
    The sum is made in fp32, in the order of the plan, and rounded once. Tokens without an entry are not touched.

    Args:
        hidden: `[T, D]`, contiguous, any floating dtype.
        residual: None, or the other half of a residual stream `hidden + residual`: a steered token then has the whole
            sum in `residual` and 0 in `hidden`, so that the sum is rounded as one tensor's would be.
        table: `[S, D]`, fp32; row 0 is 0 and stands for no direction.
        plan: `[at least T, 2 * EDITS]`, int32: rows of `table`, then strengths as the bits of fp32.
        steered: `[1]`, int64: the number of tokens that were changed is added to it.
    """
    if plan.shape[0] < hidden.shape[0]:
        raise ValueError(f"the plan holds {plan.shape[0]} tokens, but the batch has {hidden.shape[0]}")
    if hidden.is_cuda:
        from qscope_posttrain.kernels.triton.steering import steer_planned as on_cuda

        on_cuda(hidden, residual, table, plan, steered)
        return
    rows = plan[: hidden.shape[0], :EDITS].any(1).nonzero().squeeze(1)
    if len(rows) == 0:
        return
    entries = plan[rows]
    strengths = entries[:, EDITS:].contiguous().view(torch.float32)
    stream = hidden[rows].float()
    if residual is not None:
        stream += residual[rows].float()
    for number in range(EDITS):
        stream += strengths[:, number, None] * table[entries[:, number]]
    if residual is None:
        hidden[rows] = stream.to(hidden.dtype)
    else:
        residual[rows] = stream.to(residual.dtype)
        hidden[rows] = 0
    steered += len(rows)


steer_planned_.register_fake(lambda hidden, residual, table, plan, steered: None)
