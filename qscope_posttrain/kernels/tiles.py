"""The tile loop that all encoders share: x W_enc^T + b_enc in [tile_tokens, tile_features] pieces of one buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BUFFER_ELEMENTS = 1 << 24
"""Pre-activations held at a time by default: 32 MiB in bfloat16, 64 MiB in float32."""

UPCAST_ELEMENTS = 1 << 22
"""Weights held in a higher precision than they are stored in, where the product asks for it: 16 MiB in float32."""


class Tile(NamedTuple):
    """A piece of the pre-activations. `pre` is overwritten by the next tile."""

    token: int
    """First row of x."""
    feature: int
    """First feature."""
    pre: Tensor
    """[tokens of this tile, features of this tile], contiguous."""


def tile_shape(
    tokens: int, d_sae: int, tile_tokens: int | None, tile_features: int | None, limit: int = BUFFER_ELEMENTS
) -> tuple[int, int]:
    """(tokens, features) of a tile, at most `limit` elements unless asked for.

    Many tokens matter more than many features: a product packs its weights once for each tile of tokens.
    """
    if tile_features is None:
        tile_features = min(d_sae, max(1, limit // min(tile_tokens or 1024, max(tokens, 1))))
    if tile_tokens is None:
        tile_tokens = max(1, limit // tile_features)
    return max(1, min(tile_tokens, tokens)), max(1, min(tile_features, d_sae))


def result_dtype(W_enc: Tensor) -> torch.dtype:
    """Values are float32 whatever the weights are stored in, or float64 if they are."""
    return torch.promote_types(W_enc.dtype, torch.float32)


def preactivation_tiles(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype, tile_tokens: int, tile_features: int
) -> Iterator[Tile]:
    """Tiles of x W_enc^T + b_enc, computed in `dtype`: all features of the first tokens, then the next tokens.

    Weights of another dtype are converted a tile at a time. One buffer is used for all tiles.
    """
    buffer = x.new_empty(tile_tokens * tile_features, dtype=dtype)
    for token in range(0, x.shape[0], tile_tokens):
        rows = x[token : token + tile_tokens].to(dtype)
        for feature in range(0, W_enc.shape[0], tile_features):
            weight = W_enc[feature : feature + tile_features].to(dtype)
            bias = b_enc[feature : feature + tile_features].to(dtype)
            pre = buffer[: rows.shape[0] * weight.shape[0]].view(rows.shape[0], weight.shape[0])
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                torch.addmm(bias, rows, weight.t(), out=pre)
            yield Tile(token, feature, pre)
