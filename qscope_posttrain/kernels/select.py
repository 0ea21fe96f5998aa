"""Exact selection of the k first of each row, in plain torch (the definition that the other selectors reproduce) and
over the tiles of a product.

The order is total: by value, NaN above +Inf, -0.0 equal to 0.0; where values are equal, the lowest index first. So the
result depends neither on the size of a tile, nor on how a library breaks ties, nor on other rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qscope_posttrain.kernels import native
from qscope_posttrain.kernels.tiles import preactivation_tiles, tile_shape

_LOW = 0xFFFFFFFF

GROUP = 16
"""Elements of a group: the first stage leaves (k + SLACK) * GROUP candidates of d_sae."""

SLACK = 16
"""Kept beyond the k first, for those that equal the k-th."""


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
            from qscope_posttrain.kernels.triton import select as on_cuda

            bias = b_enc[tile.feature : tile.feature + tile.pre.shape[1]]
            on_cuda.merge_(values[rows], indices[rows], filled, tile.pre, tile.feature, bias)
        elif native.can_merge(tile.pre):
            native.merge_(values[rows], indices[rows], filled, tile.pre, tile.feature)
        else:
            merge_(values[rows], indices[rows], filled, tile.pre, tile.feature)
    if triton:
        values, places = best(values, indices.long(), k)
        indices = places.to(torch.int32)
    return values, indices


def merge_(values: Tensor, indices: Tensor, filled: int, pre: Tensor, offset: int) -> None:
    """Merge a tile into the k first so far, in place.

    Args:
        values: [rows, k] float32 (float64 for a float64 tile), sorted; the first `filled` of each row are meant.
        indices: [rows, k] int32, of the features of `values`, all below `offset`.
        filled: min(k, offset), the features seen so far.
        pre: [rows, n], the pre-activations of features offset, offset + 1 ..; only read, and only once.
        offset: The first feature of the tile.
    """
    k = values.shape[1]
    found, where = select_tile(pre, min(k, pre.shape[1]), values[:, k - 1] if filled == k else None)
    if found.shape[1] == 0:
        return
    where = where + offset
    if filled:
        found = torch.cat([values[:, :filled], found], dim=1)
        where = torch.cat([indices[:, :filled].long(), where], dim=1)
        found, where = best(found, where, min(k, found.shape[1]))
    values[:, : found.shape[1]] = found
    indices[:, : found.shape[1]] = where


def select_tile(pre: Tensor, k: int, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k first of each row of `pre` [rows, n] as `best` gives them, or fewer, if none above `threshold` is lost.

    `threshold` [rows]: elements at or below it are of no use (they come after k others already known).

    Exact in two stages. The n elements form groups; let t be the k-th largest maximum of a group. k distinct elements
    are at least t, so an element below t is not among the k first, and one of at least t lies in a group whose maximum
    is at least t. k + SLACK groups are looked at: all with a maximum of at least t, unless still more tie at t; rows
    where that cannot be excluded are done again without groups.
    """
    rows, n = pre.shape
    groups = n // GROUP
    if groups < 2 * (k + SLACK):
        return best(pre, torch.arange(n, device=pre.device).expand(rows, n), k)
    body = pre[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    maxima, rest = body.amax(dim=1), pre[:, groups * GROUP :]
    if threshold is not None:
        hopeful = int(_above(maxima, threshold[:, None]).sum(dim=1).amax()) if rows else 0
        k = min(k, hopeful + rest.shape[1])
    maxima, chosen = maxima.topk(k + SLACK, dim=-1)
    places = (torch.arange(GROUP, device=pre.device)[:, None] * groups + chosen[:, None, :]).flatten(1)
    if rest.shape[1]:
        tail = torch.arange(groups * GROUP, n, device=pre.device).expand(rows, -1)
        places = torch.cat([places, tail], dim=1)
    values, indices = best(pre.gather(1, places), places, k)
    if k and (tied := (~_above(maxima[:, k - 1], maxima[:, -1])).nonzero().squeeze(1)).numel():
        everything = torch.arange(n, device=pre.device).expand(len(tied), n)
        values[tied], indices[tied] = _ranked(pre[tied], everything, k)
    return values, indices


def best(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k first of `values` [rows, n] in the order above, sorted, with their `indices` [rows, n] (distinct in a row).

    Values come back in float32 (float64 if they are), indices in int64.
    """
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
