"""The units and the parameters of one layer in training, and their conversion into an SAE in raw units."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from qscope_posttrain.distributed import Reduce, alone
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import Activation, BatchTopK, JumpReLU, TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.source import SAESource
from qscope_posttrain.sae.training.config import SAETrainingConfig

_TILE_TOKENS = 4096
_ITERATIONS = 100
_TOLERANCE = 1e-4  # The median has converged when it moves by less than this share of the mean distance to it


@dataclass(frozen=True, eq=False)
class Units:
    """z = (x - center) / scale, in which an SAE is trained. fp32, on the device of the activations."""

    center: Tensor  # [d_model] geometric median of the activations
    scale: Tensor  # [] root mean square of an element of x - center
    variance: Tensor  # [] mean variance of an element of z, around the mean of z

    def normalized(self, x: Tensor) -> Tensor:
        """z, fp32: [tokens, d_model] -> [tokens, d_model]."""
        return (x.float() - self.center) / self.scale


@dataclass(eq=False)
class Parameters:
    """pre = W_enc z + b_enc; z_hat = W_dec^T f + b_dec. fp32, each requires a gradient."""

    W_enc: Tensor  # [d_sae, d_model]
    b_enc: Tensor  # [d_sae]
    W_dec: Tensor  # [d_sae, d_model], rows of norm 1
    b_dec: Tensor  # [d_model]
    log_threshold: Tensor | None = None  # [d_sae], jumprelu only

    @classmethod
    def start(cls, config: SAETrainingConfig, d_model: int, device: torch.device) -> Parameters:
        """Encoder and decoder: the same random rows of norm 1. Biases: 0, the geometric median in the units of z."""
        generator = torch.Generator().manual_seed(config.seed)
        rows = F.normalize(torch.randn(config.latents(d_model), d_model, generator=generator), dim=1).to(device)
        zeros = torch.zeros_like(rows[:, 0])
        return cls(
            W_enc=rows.clone().requires_grad_(),
            b_enc=zeros.clone().requires_grad_(),
            W_dec=rows.requires_grad_(),
            b_dec=torch.zeros(d_model, device=device).requires_grad_(),
            log_threshold=zeros.clone().requires_grad_() if config.architecture == "jumprelu" else None,
        )

    def named(self) -> dict[str, Tensor]:
        """The tensors that exist, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}


@torch.no_grad()
def geometric_median(x: Tensor, reduce: Reduce = alone) -> Tensor:
    """The point with the smallest sum of distances to the rows of x [tokens, d_model]: [d_model], fp64.

    Weiszfeld's iteration from the mean: each step is the mean of the rows weighted by their inverse distance. The few
    outlying rows of a residual stream pull it less than they pull the mean. `reduce` sums over processes.
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
    """Compute the units from the activations x [tokens, d_model], of all processes together; sums in fp64. ValueError:
    all activations are equal, so that there is nothing to learn."""
    center = geometric_median(x, reduce)
    sums, squares, power = (torch.zeros_like(center) for _ in range(3))
    for tile in x.split(_TILE_TOKENS):
        exact = _exact(tile)
        power += exact.square().sum(dim=0)
        exact = exact - center
        sums += exact.sum(dim=0)
        squares += exact.square().sum(dim=0)
    tokens = reduce(torch.tensor(float(x.shape[0]), dtype=center.dtype, device=center.device))
    mean, square = reduce(sums) / tokens, reduce(squares).mean() / tokens
    variance = square - mean.square().mean()
    if not float(variance) > 1e-12 * float(reduce(power).mean() / tokens):
        raise UserValueError(f"the activations of layer {layer} are all equal ({int(tokens)} tokens): nothing to learn")
    return Units(*(value.float().to(x.device) for value in (center, square.sqrt(), variance / square)))


@torch.no_grad()
def fold(
    layer: int, parameters: Parameters, units: Units, config: SAETrainingConfig, batch_threshold: Tensor
) -> SparseAutoencoder:
    """The SAE in raw units.

    With z = (x - center) / scale, a raw pre-activation is scale times that of training, so that decoder rows keep norm
    1: b_enc' = scale b_enc - W_enc center, b_dec' = center + scale b_dec, and thresholds are multiplied by scale.
    """
    scale, center = units.scale, units.center
    activation: Activation = TopK(config.k)
    if parameters.log_threshold is not None:
        activation = JumpReLU(scale * parameters.log_threshold.exp())
    elif config.architecture == "batch_topk":
        threshold = float(scale * batch_threshold)
        activation = BatchTopK(threshold if math.isfinite(threshold) else 0.0)
    W_enc, W_dec = parameters.W_enc.detach().clone(), parameters.W_dec.detach().clone()
    b_enc, b_dec = scale * parameters.b_enc - W_enc @ center, center + scale * parameters.b_dec
    return SparseAutoencoder(W_enc, b_enc, W_dec, b_dec, activation, layer, SAESource("trained here"))


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
    """x in fp64, on the CPU if its own device (MPS) has no fp64."""
    return x.cpu().double() if x.device.type == "mps" else x.double()
