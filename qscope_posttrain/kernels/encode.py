"""The encoders: topk_encode, threshold_encode and batch_topk_encode, without the [tokens, d_sae] matrix.

With the last two, tokens keep different numbers of features: the entries that fire are collected tile by tile, and make
a rectangle as wide as the widest token at the end. NaN never fires, since no comparison with it holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qscope_posttrain.kernels import checks
from qscope_posttrain.kernels.certified import CertifiedWeights, certified_encode
from qscope_posttrain.kernels.decode import register_encoder_gradient
from qscope_posttrain.kernels.select import preactivation_tiles, product_dtype, result_dtype, tile_shape, topk_product

PRECISIONS = ("model", "fp32", "certified")
VARIANTS = ("relu_after", "relu_before", "signed")
_BATCH_TILE = 1 << 22  # Elements of a tile of batch_topk_encode, half of which the first threshold may let through


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    precision: str = "model",
    variant: str = "relu_after",
    weights: CertifiedWeights | None = None,
    tile_tokens: int | None = None,
    tile_features: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the k largest of W_enc x + b_enc for each token.

    Args:
        x: [tokens, d_model], any floating point dtype, converted to that of the product; need not be contiguous.
        W_enc, b_enc: [d_sae, d_model] and [d_sae], of one dtype.
        k: At most d_sae.
        precision: "model": the product is in the dtype of W_enc. A bfloat16 or float16 product rounds its results, so
            that about 1 % of the kept features differ from those of a float32 product.
            "fp32": in float32 whatever the weights are stored in (float64 for float64 weights).
            "certified": a float32 result at nearly the cost of the bfloat16 product, proved row by row (`certified`).
        variant: "relu_after" relu(topk(z)); "relu_before" topk(relu(z)), the same values; "signed" topk(z).
        weights: For "certified": `certified_weights(W_enc, b_enc)`; None makes them in each call.
        tile_tokens, tile_features: Size of the tile. By default it has at most 2^24 elements.

    Returns:
        values [tokens, k], float32 (float64 for float64 weights), sorted, the largest first; indices [tokens, k],
        int32, distinct in each row. Equal values are ordered, and chosen, by the lowest index. With a ReLU, entries of
        value 0 carry a valid index but do not fire. NaN counts as the largest: a row of x with NaN returns NaN, at
        the lowest indices; other rows are not affected.

    Memory: a tile, and 12 bytes for each of tokens * k entries. Deterministic for a given tile size; another one may
    change the rounding of the product, never the order of equal values. Not affected by autocast. Differentiable with
    respect to x, W_enc and b_enc (the choice of the features is not). Saves x, values and indices.
    """
    checks.check_encoder(x, W_enc, b_enc, k)
    checks.check_choice("precision", precision, PRECISIONS)
    checks.check_choice("variant", variant, VARIANTS)
    checks.check_tiles(tile_tokens, tile_features)
    if precision == "certified":
        tiles = {"tile_tokens": tile_tokens, "tile_features": tile_features}
        return certified_encode(x, W_enc, b_enc, k, weights=weights, variant=variant, **tiles)[:2]
    if weights is not None:
        raise ValueError(f"weights belong to precision='certified', got precision={precision!r}")
    code = _topk_encode(x, W_enc, b_enc, k, precision == "fp32", variant != "signed", tile_tokens, tile_features)
    return code[0], code[1]


@torch.library.custom_op("qscope_posttrain::topk_encode", mutates_args=())
def _topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, fp32: bool, relu: bool, tokens: int | None, features: int | None
) -> tuple[Tensor, Tensor]:
    values, indices = topk_product(x, W_enc, b_enc, k, product_dtype(W_enc, fp32), tokens, features)
    return (values.relu_() if relu else values), indices


@_topk_encode.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k, dtype=result_dtype(W_enc)), x.new_empty(x.shape[0], k, dtype=torch.int32)


register_encoder_gradient(_topk_encode, relu=lambda inputs: inputs[5])


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    thresholds: Tensor | float = 0.0,
    *,
    precision: str = "model",
    tile_tokens: int | None = None,
    tile_features: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute relu(z) where z = W_enc x + b_enc exceeds a threshold: JumpReLU, ReLU, BatchTopK in inference.

    Args:
        x, W_enc, b_enc, tile_tokens, tile_features: As for `topk_encode`.
        thresholds: [d_sae], or one for all (a number or a tensor []). A feature fires if z > max(threshold, 0); z is
            compared in at least float32. They get no gradient.
        precision: "model" or "fp32", as for `topk_encode`.

    Returns:
        values [tokens, width], float32 (float64 for float64 weights), the largest first, equal ones by the lowest
        index; indices [tokens, width], int32. width is the largest number of features that fire on a token (0 if none
        does): it depends on the data, so finding it waits for the device. The rest is filled with value 0 and index 0.

    Memory: a tile with a mask of its size, and twice the result. Differentiable and deterministic as `topk_encode`.
    """
    checks.check_encoder(x, W_enc, b_enc)
    checks.check_choice("precision", precision, ("model", "fp32"))
    checks.check_tiles(tile_tokens, tile_features)
    if not isinstance(thresholds, Tensor):
        thresholds = torch.full((), thresholds, dtype=torch.float64, device=x.device)
    checks.check_floating(thresholds=thresholds)
    checks.check_same("device", x=x, thresholds=thresholds)
    if thresholds.ndim:
        checks.check_shape("thresholds", thresholds, (W_enc.shape[0],))
    if thresholds.requires_grad:
        raise ValueError("thresholds get no gradient here: pass thresholds.detach()")
    code = _threshold_encode(x, W_enc, b_enc, thresholds, precision == "fp32", tile_tokens, tile_features)
    return code[0], code[1]


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    precision: str = "model",
    tile_tokens: int | None = None,
    tile_features: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute relu(z) of the k * tokens largest z of a batch: BatchTopK in training (Bussmann et al. 2024, eq. 2).

    Arguments, result, memory, gradient and determinism as for `threshold_encode`. Fewer than k * tokens features fire
    if fewer are positive. Of equal values at the boundary, those of the first tokens are kept, then those of the lowest
    indices.
    """
    checks.check_encoder(x, W_enc, b_enc)
    checks.check_choice("precision", precision, ("model", "fp32"))
    checks.check_count("k", k)
    checks.check_tiles(tile_tokens, tile_features)
    code = _batch_topk_encode(x, W_enc, b_enc, k, precision == "fp32", tile_tokens, tile_features)
    return code[0], code[1]


class Entries(NamedTuple):
    """Some entries of the pre-activations, in any order: rows and columns int64 [n], values [n]."""

    rows: Tensor
    columns: Tensor
    values: Tensor

    def where(self, mask: Tensor) -> Entries:
        return Entries(*(part[mask] for part in self))


def _joined(*parts: Entries) -> Entries:
    return Entries(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def pack(entries: Entries, rows: int) -> tuple[Tensor, Tensor]:
    """(values [rows, width], indices int32 [rows, width]), sorted in each row: the rectangle of `entries`."""
    counts = torch.bincount(entries.rows, minlength=rows)
    width = int(counts.max()) if rows else 0
    values = entries.values.new_full((rows, width), -torch.inf)
    indices = torch.zeros(rows, width, dtype=torch.int32, device=values.device)
    order = entries.columns.argsort(stable=True)
    order = order[entries.rows[order].argsort(stable=True)]
    row, column, value = entries.where(order)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    values[row, place], indices[row, place] = value, column.to(torch.int32)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values.clamp_(min=0), indices.gather(1, order)


@torch.library.custom_op("qscope_posttrain::threshold_encode", mutates_args=())
def _threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, thresholds: Tensor, fp32: bool, tokens: int | None, features: int | None
) -> tuple[Tensor, Tensor]:
    result = result_dtype(W_enc)
    bounds = thresholds.to(result).clamp(min=0).expand(W_enc.shape[0])
    dtype = product_dtype(W_enc, fp32)
    step, span = tile_shape(x, W_enc, dtype, tokens, features)
    packed: list[tuple[Tensor, Tensor]] = []
    parts: list[Entries] = []
    for tile in preactivation_tiles(x, W_enc, b_enc, dtype, step, span):
        end = tile.feature + tile.pre.shape[1]
        row, column = (tile.pre > bounds[tile.feature : end]).nonzero(as_tuple=True)
        parts.append(Entries(row, column + tile.feature, tile.pre[row, column].to(result)))
        if end == W_enc.shape[0]:
            packed.append(pack(_joined(*parts), tile.pre.shape[0]))
            parts = []
    width = max((values.shape[1] for values, _ in packed), default=0)
    values = x.new_zeros(x.shape[0], width, dtype=result)
    indices = x.new_zeros(x.shape[0], width, dtype=torch.int32)
    for number, (found, where) in enumerate(packed):
        start = number * step
        values[start : start + len(found), : found.shape[1]] = found
        indices[start : start + len(found), : found.shape[1]] = where
    return values, indices


@torch.library.custom_op("qscope_posttrain::batch_topk_encode", mutates_args=())
def _batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, fp32: bool, tokens: int | None, features: int | None
) -> tuple[Tensor, Tensor]:
    result, wanted = result_dtype(W_enc), k * x.shape[0]
    dtype = product_dtype(W_enc, fp32)
    step, span = tile_shape(x, W_enc, dtype, tokens, features, _BATCH_TILE)
    none, threshold = x.new_empty(0, dtype=torch.int64), x.new_zeros(1, dtype=result)
    pool = Entries(none, none, threshold[:0])
    for tile in preactivation_tiles(x, W_enc, b_enc, dtype, step, span):
        row, column = ((tile.pre >= threshold) & (tile.pre > 0)).nonzero(as_tuple=True)
        found = Entries(row + tile.token, column + tile.feature, tile.pre[row, column].to(result))
        pool = _joined(pool, found)
        if len(pool.values) > wanted:  # the threshold only rises, and its ties stay: nothing of the result is lost
            threshold = pool.values.topk(wanted, sorted=False).values.amin().expand(1)
            pool = pool.where(pool.values >= threshold)
    if len(pool.values) > wanted:
        tied = (pool.values == threshold).nonzero().squeeze(1)
        places = pool.rows[tied] * W_enc.shape[0] + pool.columns[tied]
        dropped = tied[places.argsort(descending=True)[: len(pool.values) - wanted]]
        keep = torch.ones_like(pool.rows, dtype=torch.bool)
        keep[dropped] = False
        pool = pool.where(keep)
    return pack(pool, x.shape[0])


@_threshold_encode.register_fake
@_batch_topk_encode.register_fake
def _(x: Tensor, W_enc: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], torch.library.get_ctx().new_dynamic_size())
    return x.new_empty(shape, dtype=result_dtype(W_enc)), x.new_empty(shape, dtype=torch.int32)


register_encoder_gradient(_threshold_encode, relu=lambda inputs: True)
register_encoder_gradient(_batch_topk_encode, relu=lambda inputs: True)
