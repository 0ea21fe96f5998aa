"""The k largest of x W^T + b per row, tile by tile: the loop under `topk_encode` and `certified`."""

from __future__ import annotations

import torch
from torch import Tensor

from qscope_posttrain.kernels import select
from qscope_posttrain.kernels.tiles import preactivation_tiles, tile_shape


def topk_product(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    dtype: torch.dtype,
    tile_tokens: int | None = None,
    tile_features: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(values [tokens, k], indices int32 [tokens, k]) in the order of `select`, no ReLU; the product is in `dtype`."""
    values = x.new_empty(x.shape[0], k, dtype=torch.promote_types(dtype, torch.float32))
    indices = x.new_empty(x.shape[0], k, dtype=torch.int32)
    tokens, features = tile_shape(x.shape[0], W_enc.shape[0], tile_tokens, tile_features)
    for tile in preactivation_tiles(x, W_enc, b_enc, dtype, tokens, features):
        rows = slice(tile.token, tile.token + tile.pre.shape[0])
        select.merge_(values[rows], indices[rows], min(k, tile.feature), tile.pre, tile.feature)
    return values, indices
