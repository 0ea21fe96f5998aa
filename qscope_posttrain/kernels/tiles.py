"""The tile loop that all encoders share: x W_enc^T + b_enc in [tile_tokens, tile_features] pieces of one buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qscope_posttrain.kernels.checks import lowered_to

BUFFER_ELEMENTS = 1 << 24
"""Pre-activations held at a time by default: 32 MiB in bfloat16, 64 MiB in float32."""

FAST_TOKENS = 1024
"""Tokens of a tile from which on more bring little."""

CUDA_FEATURES = 8192
"""Features of a tile on CUDA: what one program of the Triton kernel holds; 1024 tokens of it, 32 MiB, stay in L2."""

CUDA_ELEMENTS = 1024 * CUDA_FEATURES

WIDENED_ELEMENTS = 1 << 23
"""Weights held in another dtype than they are stored in, where the product asks for it: 32 MiB in float32."""


class Tile(NamedTuple):
    """A piece of the pre-activations. `pre` is overwritten by the next tile."""

    token: int
    """First row of x."""
    feature: int
    """First feature."""
    pre: Tensor
    """[tokens of this tile, features of this tile], contiguous."""


def tile_shape(
    x: Tensor,
    W_enc: Tensor,
    dtype: torch.dtype,
    tile_tokens: int | None,
    tile_features: int | None,
    limit: int = BUFFER_ELEMENTS,
) -> tuple[int, int]:
    """(tokens, features) of a tile of the product in `dtype`, at most `limit` elements unless asked for.

    Many tokens matter more than many features: a product packs its weights once for each tile of tokens.
    """
    tokens, (d_sae, d_model) = max(1, x.shape[0]), W_enc.shape
    if x.is_cuda:
        limit = min(limit, CUDA_ELEMENTS)
    if tile_features is None:
        tile_features = max(1, limit // min(tile_tokens or FAST_TOKENS, tokens))
        if x.is_cuda:
            tile_features = min(tile_features, CUDA_FEATURES)
        if W_enc.dtype != dtype:
            tile_features = min(tile_features, max(1, WIDENED_ELEMENTS // max(1, d_model)))
    tile_features = min(tile_features, d_sae)
    if tile_tokens is None:
        tile_tokens = max(1, limit // tile_features)
    return min(tile_tokens, tokens), tile_features


def result_dtype(W_enc: Tensor) -> torch.dtype:
    """Values are float32 whatever the weights are stored in, or float64 if they are."""
    return torch.promote_types(W_enc.dtype, torch.float32)


def product_dtype(W_enc: Tensor, fp32: bool) -> torch.dtype:
    """The dtype of the product: that of the weights, or at least float32, which then must not be lowered to less."""
    if not fp32:
        return W_enc.dtype
    dtype, lowered = result_dtype(W_enc), lowered_to(W_enc.device)
    if dtype == torch.float32 and lowered is not None:
        raise ValueError(
            f"precision 'fp32' and 'certified' need float32 products, but those on {W_enc.device.type} are lowered to "
            f"{lowered}: undo it where it was set, by torch.set_float32_matmul_precision('highest') or by "
            "torch.backends.fp32_precision = 'ieee' (transformers' tf32=True sets the latter), or use "
            "precision='model'"
        )
    return dtype


def preactivation_tiles(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    dtype: torch.dtype,
    tile_tokens: int,
    tile_features: int,
    add_bias: bool = True,
) -> Iterator[Tile]:
    """Tiles of x W_enc^T + b_enc, computed in `dtype`: all features of the first tokens, then the next tokens.

    Weights of another dtype are converted a tile at a time. One buffer is used for all tiles: in `dtype`, on CUDA in at
    least float32, so that nothing is rounded between the product and the selection. Without `add_bias`, x W_enc^T.
    """
    wide_result = x.is_cuda and dtype in (torch.bfloat16, torch.float16)
    buffer = x.new_empty(tile_tokens * tile_features, dtype=torch.float32 if wide_result else dtype)
    for token in range(0, x.shape[0], tile_tokens):
        rows = x[token : token + tile_tokens].to(dtype)
        for feature in range(0, W_enc.shape[0], tile_features):
            weight = W_enc[feature : feature + tile_features].to(dtype).t()
            bias = b_enc[feature : feature + tile_features]
            pre = buffer[: rows.shape[0] * weight.shape[1]].view(rows.shape[0], weight.shape[1])
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                if wide_result:
                    torch.mm(rows, weight, out_dtype=torch.float32, out=pre)
                    if add_bias:
                        pre.add_(bias)
                elif add_bias:
                    torch.addmm(bias.to(dtype), rows, weight, out=pre)
                else:
                    torch.mm(rows, weight, out=pre)
            yield Tile(token, feature, pre)
