"""topk_encode: the k largest pre-activations of each token, without the [tokens, d_sae] matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qscope_posttrain.kernels.checks import check_choice, check_count, check_encoder
from qscope_posttrain.kernels.select import best, select_tile
from qscope_posttrain.kernels.tiles import preactivation_tiles, tile_shape

PRECISIONS = ("model", "fp32", "certified")
VARIANTS = ("relu_after", "relu_before", "signed")


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    precision: str = "model",
    variant: str = "relu_after",
    tile_tokens: int | None = None,
    tile_features: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of W_enc x + b_enc per token: (values [tokens, k], indices int32 [tokens, k])."""
    check_encoder(x, W_enc, b_enc)
    check_count("k", k)
    if k > W_enc.shape[0]:
        raise ValueError(f"k={k} features were asked for, but the dictionary has only {W_enc.shape[0]}")
    check_choice("precision", precision, PRECISIONS)
    check_choice("variant", variant, VARIANTS)
    for name, tile in (("tile_tokens", tile_tokens), ("tile_features", tile_features)):
        if tile is not None:
            check_count(name, tile)
    return torch.ops.qscope_posttrain.topk_encode(
        x, W_enc, b_enc, k, precision, variant != "signed", tile_tokens, tile_features
    )


@torch.library.custom_op("qscope_posttrain::topk_encode", mutates_args=())
def _topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    precision: str,
    relu: bool,
    tile_tokens: int | None,
    tile_features: int | None,
) -> tuple[Tensor, Tensor]:
    dtype = W_enc.dtype if precision == "model" else torch.promote_types(W_enc.dtype, torch.float32)
    tokens, features = tile_shape(x.shape[0], W_enc.shape[0], tile_tokens, tile_features)
    values = x.new_empty(x.shape[0], k, dtype=result_dtype(W_enc))
    indices = x.new_empty(x.shape[0], k, dtype=torch.int32)
    running: tuple[Tensor, Tensor] | None = None
    with torch.autocast(x.device.type, enabled=False):
        for tile in preactivation_tiles(x, W_enc, b_enc, dtype, tokens, features):
            found, where = select_tile(tile.pre, min(k, tile.pre.shape[1]))
            where = where + tile.feature
            if tile.feature and running is not None:
                found, where = torch.cat([running[0], found], 1), torch.cat([running[1], where], 1)
                found, where = best(found, where, min(k, found.shape[1]))
            running = found, where
            if tile.feature + tile.pre.shape[1] == W_enc.shape[0]:
                rows = slice(tile.token, tile.token + found.shape[0])
                values[rows], indices[rows] = found, where
    return (values.relu_() if relu else values), indices


@_topk_encode.register_fake
def _(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    precision: str,
    relu: bool,
    tile_tokens: int | None,
    tile_features: int | None,
) -> Sequence[Tensor]:
    return x.new_empty(x.shape[0], k, dtype=result_dtype(W_enc)), x.new_empty(x.shape[0], k, dtype=torch.int32)


def result_dtype(W_enc: Tensor) -> torch.dtype:
    """Values are float32 whatever the weights are, or float64 if they are."""
    return torch.promote_types(W_enc.dtype, torch.float32)
