"""The k largest of x W^T + b per row, tile by tile: the loop under `topk_encode` and `certified_encode`."""

from __future__ import annotations

import torch
from torch import Tensor

from qscope_posttrain.kernels import native, select
from qscope_posttrain.kernels.tiles import preactivation_tiles, tile_shape


def topk_product(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    dtype: torch.dtype,
    tile_tokens: int | None = None,
    tile_features: int | None = None,
    triton: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(values [tokens, k], indices int32 [tokens, k]) in the order of `select`, no ReLU; the product is in `dtype`.

    `triton`: select with the Triton kernel; by default on CUDA, and elsewhere in tests, interpreted.
    """
    triton = x.is_cuda if triton is None else triton
    values = x.new_empty(x.shape[0], k, dtype=torch.promote_types(dtype, torch.float32))
    indices = x.new_empty(x.shape[0], k, dtype=torch.int32)
    tokens, features = tile_shape(x, W_enc, dtype, tile_tokens, tile_features)
    for tile in preactivation_tiles(x, W_enc, b_enc, dtype, tokens, features, add_bias=not triton):
        rows, filled = slice(tile.token, tile.token + tile.pre.shape[0]), min(k, tile.feature)
        if triton:
            from qscope_posttrain.kernels.triton.select import merge_

            bias = b_enc[tile.feature : tile.feature + tile.pre.shape[1]]
            merge_(values[rows], indices[rows], filled, tile.pre, tile.feature, bias)
        elif native.can_merge(tile.pre):
            native.merge_(values[rows], indices[rows], filled, tile.pre, tile.feature)
        else:
            select.merge_(values[rows], indices[rows], filled, tile.pre, tile.feature)
    if triton:
        values, places = select.best(values, indices.long(), k)
        indices = places.to(torch.int32)
    return values, indices
