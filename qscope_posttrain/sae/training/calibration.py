"""The units of training: where the activations of a layer lie and how far they spread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qscope_posttrain.distributed import Reduce, alone
from qscope_posttrain.errors import UserValueError

_TILE_TOKENS = 4096
_ITERATIONS = 100
_TOLERANCE = 1e-4
"""Movement of the median in one iteration, as a share of the mean distance to it, at which it stands."""


@dataclass(frozen=True, eq=False)
class Units:
    """z = (x - centre) / scale, in which a dictionary is trained. fp32, on the device of the activations."""

    centre: Tensor
    """[d_model] geometric median of the activations"""
    scale: Tensor
    """[] root mean square of an element of x - centre"""
    variance: Tensor
    """[] mean variance of an element of z, around the mean of z"""

    def normalised(self, x: Tensor) -> Tensor:
        """z, fp32: [tokens, d_model] -> [tokens, d_model]."""
        return (x.float() - self.centre) / self.scale

    def tensors(self) -> dict[str, Tensor]:
        return {"centre": self.centre, "scale": self.scale, "variance": self.variance}


@torch.no_grad()
def geometric_median(x: Tensor, reduce: Reduce = alone) -> Tensor:
    """The point with the smallest sum of distances to the rows of x [tokens, d_model]: [d_model], fp64.

    Weiszfeld's iteration from the mean: each step is the mean of the rows weighted by the inverse of their distance.
    Less than the mean is it drawn to a few rows far out, which the residual stream has. With `reduce` the rows of all
    processes count.
    """
    point, _ = _weighted_mean(x, None, reduce)
    for _ in range(_ITERATIONS):
        moved, spread = _weighted_mean(x, point, reduce)
        step = torch.linalg.vector_norm(moved - point)
        point = moved
        if float(step) <= _TOLERANCE * float(spread):
            break
    return point


@torch.no_grad()
def calibrate(layer: int, x: Tensor, reduce: Reduce = alone) -> Units:
    """Units from the activations x [tokens, d_model], of all processes together; sums in fp64.

    Raises:
        ValueError: all activations are equal, so that there is nothing to learn.
    """
    centre = geometric_median(x, reduce)
    sums = torch.zeros_like(centre)
    squares = torch.zeros_like(centre)
    power = torch.zeros_like(centre)
    for tile in x.split(_TILE_TOKENS):
        exact = _exact(tile)
        power += exact.square().sum(dim=0)
        exact = exact - centre
        sums += exact.sum(dim=0)
        squares += exact.square().sum(dim=0)
    tokens = reduce(torch.tensor(float(x.shape[0]), dtype=centre.dtype, device=centre.device))
    mean, square = reduce(sums) / tokens, reduce(squares).mean() / tokens
    variance = square - mean.square().mean()
    if not float(variance) > 1e-12 * float(reduce(power).mean() / tokens):
        raise UserValueError(f"the activations of layer {layer} are all equal ({int(tokens)} tokens): nothing to learn")
    return Units(*(value.float().to(x.device) for value in (centre, square.sqrt(), variance / square)))


def _weighted_mean(x: Tensor, around: Tensor | None, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """(mean of the rows, weighted by 1 / distance to `around`; harmonic mean of these distances). Without `around` all
    weights are 1. A row that lies at `around` has the weight of a distance of 1e-12 of its norm."""
    sums = _exact(x.new_zeros(x.shape[1] + 2))
    least = None if around is None else 1e-12 * torch.linalg.vector_norm(around).clamp_min(1e-12)
    for tile in x.split(_TILE_TOKENS):
        exact = _exact(tile)
        weights = exact.new_ones(len(exact))
        if around is not None:
            weights = 1 / torch.linalg.vector_norm(exact - around, dim=1).clamp_min(least)
        sums[:-2] += weights @ exact
        sums[-2] += weights.sum()
        sums[-1] += len(tile)
    sums = reduce(sums)
    return sums[:-2] / sums[-2], sums[-1] / sums[-2]


def _exact(x: Tensor) -> Tensor:
    """x in fp64, on the CPU where its own device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()
