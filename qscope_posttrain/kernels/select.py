"""Pre-activations by tiles, and the exact selection of the k first of each row among them, in plain torch.

All encoders share the tile loop: x W_enc^T + b_enc in [tile_tokens, tile_features] pieces of one buffer. The selectors
in C and Triton give the same as the one here.

The order is total: by value, NaN above +Inf, -0.0 equal to 0.0; where values are equal, the lowest index first. So the
result depends neither on the size of a tile, nor on how a library breaks ties, nor on other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qscope_posttrain.kernels import native
from qscope_posttrain.kernels.checks import lowered_to

BUFFER_ELEMENTS = 1 << 24  # Pre-activations held at a time by default: 32 MiB in bfloat16, 64 MiB in float32
FAST_TOKENS = 1024  # Tokens of a tile from which on more bring little
CUDA_FEATURES = 8192  # Features of a tile on CUDA: those of one Triton program; 1024 tokens of it stay in L2
WIDENED_ELEMENTS = 1 << 23  # Weights converted at a time to the dtype of the product: 32 MiB in float32
_LOW = 0xFFFFFFFF
SLACK = 16  # Kept beyond the k first, for those that equal the k-th


class Tile(NamedTuple):
    """A piece of the pre-activations from row `token` of x and `feature` on. `pre` is overwritten by the next tile."""

    token: int
    feature: int
    pre: Tensor  # [tokens of this tile, features of this tile], contiguous


def tile_shape(
    x: Tensor, W_enc: Tensor, dtype: torch.dtype, tokens: int | None, features: int | None, limit: int = BUFFER_ELEMENTS
) -> tuple[int, int]:
    """(tokens, features) of a tile of the product in `dtype`: as given, or so that it has at most `limit` elements."""
    # Many tokens matter more than many features: a product packs its weights once for each tile of tokens.
    rows, (d_sae, d_model) = max(1, x.shape[0]), W_enc.shape
    if x.is_cuda:
        limit = min(limit, 1024 * CUDA_FEATURES)
    if features is None:
        features = max(1, limit // min(tokens or FAST_TOKENS, rows))
        if x.is_cuda:
            features = min(features, CUDA_FEATURES)
        if W_enc.dtype != dtype:
            features = min(features, max(1, WIDENED_ELEMENTS // max(1, d_model)))
    features = min(features, d_sae)
    return min(max(1, limit // features) if tokens is None else tokens, rows), features


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
    x: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype, tokens: int, features: int, add_bias: bool = True
) -> Iterator[Tile]:
    """Yield tiles of x W_enc^T + b_enc (b_enc only with `add_bias`), computed in `dtype` in one buffer: all features of
    the first tokens, then the next tokens. Weights of another dtype are converted a tile at a time."""
    # On CUDA nothing is rounded between the product and the selection.
    wide_result = x.is_cuda and dtype in (torch.bfloat16, torch.float16)
    buffer = x.new_empty(tokens * features, dtype=torch.float32 if wide_result else dtype)
    for token in range(0, x.shape[0], tokens):
        rows = x[token : token + tokens].to(dtype)
        for feature in range(0, W_enc.shape[0], features):
            weight = W_enc[feature : feature + features].to(dtype).t()
            bias = b_enc[feature : feature + features]
            pre = buffer[: rows.shape[0] * weight.shape[1]].view(rows.shape[0], weight.shape[1])
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                if add_bias and not wide_result:
                    torch.addmm(bias.to(dtype), rows, weight, out=pre)
                else:
                    torch.mm(rows, weight, **({"out_dtype": torch.float32} if wide_result else {}), out=pre)
                    if add_bias:
                        pre.add_(bias)
            yield Tile(token, feature, pre)


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
    """(values [tokens, k], indices int32 [tokens, k]) in the order above, no ReLU, of a product in `dtype`. `triton`:
    select with the Triton kernel; by default on CUDA, and elsewhere in tests, interpreted."""
    triton = x.is_cuda if triton is None else triton
    values = x.new_empty(x.shape[0], k, dtype=torch.promote_types(dtype, torch.float32))
    indices = x.new_empty(x.shape[0], k, dtype=torch.int32)
    tokens, features = tile_shape(x, W_enc, dtype, tile_tokens, tile_features)
    for tile in preactivation_tiles(x, W_enc, b_enc, dtype, tokens, features, add_bias=not triton):
        rows, filled = slice(tile.token, tile.token + tile.pre.shape[0]), min(k, tile.feature)
        if triton:
            from qscope_posttrain.kernels.triton import select as on_cuda

            bias = b_enc[tile.feature : tile.feature + tile.pre.shape[1]]
            on_cuda.merge_(values[rows], indices[rows], filled, tile.pre, tile.feature, bias)
        else:
            merge = native.merge_ if native.can_merge(tile.pre) else merge_
            merge(values[rows], indices[rows], filled, tile.pre, tile.feature)
    if triton:
        values, places = best(values, indices.long(), k)
        indices = places.to(torch.int32)
    return values, indices


def merge_(values: Tensor, indices: Tensor, filled: int, pre: Tensor, offset: int) -> None:
    """Merge a tile, the pre-activations `pre` [rows, n] of features `offset`, offset + 1 .., into the k first so far.

    `values` [rows, k], sorted, float32 (float64 for a float64 tile) and `indices` [rows, k], int32, change in place:
    their first `filled` = min(k, offset) columns hold the k first so far.
    """
    k, (rows, n) = values.shape[1], pre.shape
    places = torch.arange(offset, offset + n, device=pre.device).expand(rows, n)
    found, where = best(pre, places, min(k, n))
    if filled:
        found = torch.cat([values[:, :filled], found], dim=1)
        where = torch.cat([indices[:, :filled].long(), where], dim=1)
        found, where = best(found, where, min(k, found.shape[1]))
    values[:, : found.shape[1]] = found
    indices[:, : found.shape[1]] = where


def best(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k first of `values` [rows, n] in the order above, sorted, in float32 (float64 if they are), with their
    `indices` [rows, n] (distinct in a row), in int64."""
    if values.shape[1] <= 2 * (k + SLACK):
        return _ranked(values, indices, k)
    some, places = values.topk(k + SLACK, dim=-1)
    kept = _ranked(some, indices.gather(1, places), k)
    if k and (tied := (~_above(some[:, k - 1], some[:, -1])).nonzero().squeeze(1)).numel():
        kept[0][tied], kept[1][tied] = _ranked(values[tied], indices[tied], k)
    return kept


def _above(left: Tensor, right: Tensor) -> Tensor:
    """left > right, with NaN above everything else."""
    return (left > right) | (left.isnan() & ~right.isnan())


def _ranked(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `best`, at the cost of a key for every element."""
    if values.dtype == torch.float64:  # value and index do not fit one integer
        indices, order = indices.sort(dim=-1)
        values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        return values[:, :k], indices.gather(-1, order)[:, :k]
    keys = order_keys(values, indices).topk(k, dim=-1, sorted=True).values
    monotone = keys >> 32
    bits = torch.where(monotone < 0, -(2**31) - 1 - monotone, monotone)
    return bits.to(torch.int32).view(torch.float32), _LOW - (keys & _LOW)


def order_keys(values: Tensor, indices: Tensor) -> Tensor:
    """int64 keys in the order above: the value's bits, made monotone, over the complement of the index."""
    values = values.float() + 0.0  # -0.0 becomes 0.0
    bits = values.view(torch.int32).long()
    bits = torch.where(values.isnan(), 0x7FC00000, bits)  # one NaN, whatever its sign and payload
    return (torch.where(bits < 0, -(2**31) - 1 - bits, bits) << 32) | (_LOW - indices)
