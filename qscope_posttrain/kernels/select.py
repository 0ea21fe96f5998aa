"""Exact selection of the k largest of each row, ties to the lowest index, in plain torch.

The order is total: by value, NaN above +Inf, -0.0 equal to 0.0, and by index, the lowest first, where values are
equal. So a result depends neither on the tile size nor on how a library breaks ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF

GROUP = 16
"""Elements of a group in the first stage. Of the order of d_sae / (10 k) at the usual sizes."""

SLACK = 16
"""Groups kept beyond the k first, for maxima that equal the k-th."""


def select_tile(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k first of each row of `pre` [rows, n], as `best` gives them, reading `pre` once.

    Exact in two stages. The n elements form groups; let t be the k-th largest maximum of a group. k distinct elements
    are at least t, so an element below t is not among the k first, and one of at least t lies in a group whose maximum
    is at least t. So the groups with a maximum of at least t hold all that is wanted. k + SLACK groups are looked at;
    rows with still more groups that tie at t are done again without groups.
    """
    rows, n = pre.shape
    groups, keep = n // GROUP, k + SLACK
    if groups < 2 * keep or pre.dtype == torch.float64:
        return best(pre, torch.arange(n, device=pre.device).expand(rows, n), k)
    body = pre[:, : groups * GROUP].view(rows, GROUP, groups) if n % GROUP == 0 else None
    if body is None:
        body = pre[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    maxima, chosen = body.amax(dim=1).topk(keep, dim=-1)
    places = torch.arange(GROUP, device=pre.device)[:, None] * groups + chosen[:, None, :]
    places = places.flatten(1)
    if n % GROUP:
        rest = torch.arange(groups * GROUP, n, device=pre.device).expand(rows, -1)
        places = torch.cat([places, rest], dim=1)
    values, indices = best(pre.gather(1, places), places, k)
    tied = _not_below(maxima[:, -1], maxima[:, k - 1]).nonzero().squeeze(1)
    if tied.numel():
        again = pre[tied]
        values[tied], indices[tied] = best(again, torch.arange(n, device=pre.device).expand(len(tied), n), k)
    return values, indices


def _not_below(last: Tensor, threshold: Tensor) -> Tensor:
    return ~(last < threshold) & ~(threshold.isnan() & ~last.isnan())


def best(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k first of `values` [rows, n] in the order above, sorted; with their `indices` [rows, n] (int64, distinct).

    The values come back in float32, or in float64 if they are.
    """
    if values.dtype == torch.float64:
        indices, order = indices.sort(dim=-1)
        values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        return values[:, :k], indices.gather(-1, order)[:, :k]
    keys = order_keys(values, indices).topk(k, dim=-1, sorted=True).values
    return values_of(keys), indices_of(keys)


def order_keys(values: Tensor, indices: Tensor) -> Tensor:
    """int64 keys whose order is the order above: the value's bits, made monotone, over the complement of the index."""
    values = values.float() + 0.0  # -0.0 becomes 0.0
    bits = values.view(torch.int32).long()
    bits = torch.where(values.isnan(), 0x7FC00000, bits)  # one NaN, whatever its sign and payload
    monotone = torch.where(bits < 0, -(2**31) - 1 - bits, bits)
    return (monotone << 32) | (_LOW - indices)


def values_of(keys: Tensor) -> Tensor:
    """The float32 values within `order_keys`."""
    monotone = keys >> 32
    bits = torch.where(monotone < 0, -(2**31) - 1 - monotone, monotone)
    return bits.to(torch.int32).view(torch.float32)


def indices_of(keys: Tensor) -> Tensor:
    """The indices within `order_keys`, int64."""
    return _LOW - (keys & _LOW)
