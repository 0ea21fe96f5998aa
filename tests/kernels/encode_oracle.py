"""What the encoders must return, in float64 and one line each, and inputs on which every product is exact."""

from __future__ import annotations

import torch
from torch import Tensor


def preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    return x.double() @ W_enc.double().T + b_enc.double()


def topk(pre: Tensor, k: int, relu: bool = True) -> tuple[Tensor, Tensor]:
    """By value, NaN first, then by the lowest index: a stable sort of whole rows."""
    values, indices = pre.sort(dim=1, descending=True, stable=True)
    return values[:, :k].relu() if relu else values[:, :k], indices[:, :k]


def dense(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    return values.new_zeros(len(values), d_sae).scatter_add(1, indices.long(), values)


def exact_inputs(tokens: int, d_model: int, d_sae: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Small integers: sums are exact in every dtype, and ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(-3, 4, shape, generator=generator).clamp(-limit, limit).to(dtype)
        for shape, limit in (((tokens, d_model), 3), ((d_sae, d_model), 1), ((d_sae,), 2))
    )


def random_inputs(tokens: int, d_model: int, d_sae: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_model, generator=generator, dtype=torch.float64)
    W_enc = torch.randn(d_sae, d_model, generator=generator, dtype=torch.float64) / d_model**0.5
    b_enc = torch.randn(d_sae, generator=generator, dtype=torch.float64) / 10
    return x.to(dtype), W_enc.to(dtype), b_enc.to(dtype)
