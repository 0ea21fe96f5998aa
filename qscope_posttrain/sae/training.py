"""A compact TopK trainer for activations that fit in memory: what the testbed needs, and no more.

In units z = x / scale, where `scale` is the root mean square of an element of x:

    pre   = W_enc (z - b) + b_enc
    f     = relu(topk_k(pre))
    z_hat = W_dec^T f + b
    loss  = mean (z_hat - z)^2 / variance  +  weight * AuxK

W_enc and W_dec start as the same random unit rows, b as the mean of z; decoder rows keep norm 1. AuxK (Gao et al. 2024,
arXiv 2406.04093, appendix A.2) lets latents that have been silent for long reconstruct the error that the others leave,
as a share of that error. At the end everything is folded into raw units, so that the result is a canonical
`SparseAutoencoder`: b_enc' = scale (b_enc - W_enc b), b_dec' = scale b, and f' = scale f.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qscope_posttrain.report.progress import progress as shown
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.checks import check_finite, check_tensor
from qscope_posttrain.sae.source import SAESource

_EVALUATION_TOKENS = 4096


@dataclass(frozen=True)
class TopKTrainingConfig:
    """Settings of `train_saes`; the defaults suit a d_model of 64 to 256 and some 100,000 tokens."""

    expansion: int = 8
    """Latents per dimension of the residual stream; ignored where `width` is given."""
    width: int | None = None
    """Number of latents."""
    k: int = 32
    """Latents that may fire on a token."""
    steps: int = 300
    """Updates per layer."""
    batch_tokens: int = 1024
    """Tokens per update, drawn without replacement until all have been seen."""
    learning_rate: float = 3e-3
    """Peak rate of Adam."""
    warmup_steps: int = 30
    """Updates of linear warm-up."""
    decay_start: float = 0.7
    """Share of the steps after which the rate falls linearly, to 2 % of the peak."""
    auxk_weight: float = 1 / 32
    """Weight of the AuxK loss, averaged over steps; 0 switches it off."""
    auxk_every: int = 4
    """AuxK is computed on every n-th step, with n times its weight."""
    auxk_k: int | None = None
    """Silent latents that may fire on a token in AuxK; by default half of d_model."""
    dead_after: int = 100
    """Steps without firing after which a latent counts as silent."""
    seed: int = 0
    """Fixes initialisation and order of the tokens; the same for every layer."""

    def __post_init__(self) -> None:
        at_least_one = ("expansion", "k", "steps", "batch_tokens", "auxk_every", "dead_after")
        for name in at_least_one:
            _require(isinstance(getattr(self, name), int) and getattr(self, name) >= 1, self, name, "an integer from 1")
        for name in ("width", "auxk_k"):
            value = getattr(self, name)
            _require(value is None or (isinstance(value, int) and value >= 1), self, name, "an integer from 1, or None")
        _require(self.warmup_steps >= 0, self, "warmup_steps", "0 or more")
        _require(math.isfinite(self.learning_rate) and self.learning_rate > 0, self, "learning_rate", "above 0")
        _require(0 <= self.decay_start <= 1, self, "decay_start", "a share from 0 to 1")
        _require(math.isfinite(self.auxk_weight) and self.auxk_weight >= 0, self, "auxk_weight", "0 or more")

    def latents(self, d_model: int) -> int:
        """Number of latents for a residual stream of width `d_model`. ValueError if it is below k."""
        width = self.expansion * d_model if self.width is None else self.width
        if self.k > width:
            raise ValueError(f"k={self.k} latents are to fire, but the dictionary would have only {width}")
        return width

    def rate(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0: warm-up, flat, then linear decay to 2 %."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        start = self.decay_start * self.steps
        left = (self.steps - step) / (self.steps - start) if step > start else 1.0
        return self.learning_rate * warm * (0.02 + 0.98 * min(1.0, left))


def train_saes(
    activations: Mapping[int, Tensor], config: TopKTrainingConfig | None = None, progress: bool | None = None
) -> dict[int, SparseAutoencoder]:
    """Train one dictionary per layer.

    Args:
        activations: Raw outputs of decoder layers, layer -> [tokens, d_model], any float dtype. Training runs on
            their device, in float32. Leave first tokens and norm outliers out: they would dominate scale and loss.
        config: Settings; defaults if None.
        progress: Show a progress line per layer; by default where a progress bar is welcome.

    Returns:
        layer -> dictionary in raw units (float32, decoder rows of norm 1). A layer's result depends on its own
        activations and the configuration only, and is reproducible on the same machine and number of threads.

    Raises:
        ValueError: activations that are not [tokens, d_model], not finite, or all equal; k above the width.
    """
    config = TopKTrainingConfig() if config is None else config
    for layer, x in activations.items():
        check_tensor(f"activations of layer {layer}", x, (None, None))
        check_finite(f"activations of layer {layer}", x)
        config.latents(x.shape[1])
    return {layer: _train_layer(layer, x, config, progress) for layer, x in activations.items()}


@torch.no_grad()
def explained_variance(sae: SparseAutoencoder, x: Tensor) -> float:
    """1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2 over tokens [tokens, d_model]; 1 is perfect, sums in float64."""
    if x.shape[0] < 2:
        raise ValueError(f"explained variance needs at least 2 tokens, got {x.shape[0]}")
    mean = x.mean(dim=0, dtype=torch.float64)
    left = x.new_zeros((), dtype=torch.float64)
    total = torch.zeros_like(left)
    for tile in x.split(_EVALUATION_TOKENS):
        left += (tile.double() - sae.decode(*sae.encode(tile)).double()).square().sum()
        total += (tile.double() - mean).square().sum()
    return float(1 - left / total)


class _SparseDecode(torch.autograd.Function):
    """sum_j values_j W_dec[indices_j]. Forward gathers rows; backward is two dense products, which on a CPU beat the
    scattered backward of `embedding_bag` several times over at the widths trained here."""

    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(values, indices, W_dec)
        return F.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[no-untyped-def,override]
        values, indices, W_dec = ctx.saved_tensors
        dense = gradient @ W_dec.t()
        gradient_values = dense.gather(1, indices)
        code = dense.zero_().scatter_(1, indices, values)
        return gradient_values, None, code.t() @ gradient


def _train_layer(layer: int, x: Tensor, config: TopKTrainingConfig, progress: bool | None) -> SparseAutoencoder:
    scale, bias, variance = _moments(layer, x)
    generator = torch.Generator().manual_seed(config.seed)
    rows = torch.randn(config.latents(x.shape[1]), x.shape[1], generator=generator)
    rows = F.normalize(rows, dim=1).to(x.device)
    W_enc, W_dec = rows.clone().requires_grad_(), rows.requires_grad_()
    b_enc, b = torch.zeros_like(rows[:, 0]).requires_grad_(), bias.requires_grad_()
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b], lr=config.learning_rate, fused=True)
    silent = torch.zeros(rows.shape[0], dtype=torch.int64, device=x.device)
    unexplained = torch.zeros(())
    batches = _batches(x.shape[0], config, generator)
    steps = shown(
        enumerate(batches),
        total=config.steps,
        description=f"training the SAE of layer {layer}",
        enabled=progress,
        note=lambda: f"unexplained variance {float(unexplained):.3f}",
    )
    for step, tokens in steps:
        z = x[tokens.to(x.device)].float() / scale
        pre = F.linear(z, W_enc, b_enc - W_enc @ b)
        indices = _top_k_indices(pre.detach(), config.k)
        values = pre.gather(1, indices).relu()
        error = _SparseDecode.apply(values, indices, W_dec) + b - z
        loss = error.square().mean() / variance
        unexplained = loss.detach()
        silent += 1
        silent[indices[values > 0]] = 0
        if config.auxk_weight and step % config.auxk_every == 0:
            dead = (silent > config.dead_after).nonzero().squeeze(1)
            if dead.numel():
                aux = _auxk(-error.detach(), pre, dead, W_dec, config.auxk_k or max(1, x.shape[1] // 2))
                loss = loss + config.auxk_every * config.auxk_weight * aux
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        _step_on_unit_rows(optimizer, W_dec)
    return _fold(layer, W_enc.detach(), b_enc.detach(), W_dec.detach(), b.detach(), scale, config.k)


def _moments(layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scale [], mean of x / scale [d_model], variance of an element of x / scale around that mean [])."""
    sums = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    squares = torch.zeros_like(sums)
    for tile in x.split(_EVALUATION_TOKENS):
        tile = tile.double()
        sums += tile.sum(dim=0)
        squares += tile.square().sum(dim=0)
    mean, power = sums / x.shape[0], squares.mean() / x.shape[0]
    variance = power - mean.square().mean()
    if not float(variance) > 1e-12 * float(power):
        raise ValueError(f"the activations of layer {layer} are all equal ({x.shape[0]} tokens): nothing to learn")
    scale = power.sqrt()
    return scale.float(), (mean / scale).float(), (variance / power).float()


def _batches(tokens: int, config: TopKTrainingConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """`config.steps` batches of token indices; every token is drawn once before any is drawn again."""
    size = min(config.batch_tokens, tokens)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(config.steps):
        if order.numel() < size:
            order = torch.cat((order, torch.randperm(tokens, generator=generator)))
        yield order[:size]
        order = order[size:]


def _top_k_indices(pre: Tensor, k: int) -> Tensor:
    """Indices [tokens, k] of the k largest, in no order. On the CPU numpy's partition takes a third of topk's time."""
    if pre.device.type != "cpu" or k == pre.shape[1]:
        return pre.topk(k, dim=1, sorted=False).indices
    import numpy as np

    return torch.from_numpy(np.argpartition(pre.numpy(), pre.shape[1] - k, axis=1)[:, -k:])


def _auxk(error: Tensor, pre: Tensor, dead: Tensor, W_dec: Tensor, k: int) -> Tensor:
    """Share of `error` [tokens, d_model] that the `dead` latents leave unexplained, with at most k of them a token."""
    candidates = pre[:, dead]
    chosen = _top_k_indices(candidates.detach(), min(k, dead.numel()))
    values = candidates.gather(1, chosen).relu()
    left = _SparseDecode.apply(values, dead[chosen], W_dec) - error
    return left.square().mean() / error.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _step_on_unit_rows(optimizer: torch.optim.Optimizer, W_dec: Tensor) -> None:
    """One update that keeps decoder rows at norm 1: the gradient along a row would only change its norm."""
    gradient = W_dec.grad
    if gradient is not None:
        gradient -= (gradient * W_dec).sum(dim=1, keepdim=True) * W_dec
    optimizer.step()
    W_dec /= W_dec.norm(dim=1, keepdim=True)


def _fold(
    layer: int, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b: Tensor, scale: Tensor, k: int
) -> SparseAutoencoder:
    """From units of x / scale around b to raw units. The factor of f goes into b_enc, since W_enc meets x, not z."""
    return SparseAutoencoder(
        W_enc=W_enc,
        b_enc=scale * (b_enc - W_enc @ b),
        W_dec=W_dec,
        b_dec=scale * b,
        activation=TopK(k),
        layer=layer,
        source=SAESource("trained in memory"),
    )


def _require(condition: bool, config: TopKTrainingConfig, name: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {getattr(config, name)!r}")
