"""One layer in training: its sparse codes, its parameters, optimizer and counters, and the update that moves them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.distributed import Reduce, alone, gathered
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.kernels import batch_topk_encode, sparse_decode, threshold_encode, topk_encode
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.training.config import SAETrainingConfig
from qscope_posttrain.sae.training.parameters import Parameters, Units, fold

_UNITS = ("units.centre", "units.scale", "units.variance")  # Names of the units in a checkpoint


@dataclass(frozen=True, eq=False)
class Code:
    """The latents that fire on a batch."""

    values: Tensor  # [tokens, width] fp32; entries of value 0 only fill the rectangle
    indices: Tensor  # [tokens, width] int32
    fires: Tensor | None = None  # jumprelu: [tokens, width], 1 where a latent fires, with an estimated gradient


def topk_code(z: Tensor, parameters: Parameters, k: int) -> Code:
    """The k largest positive pre-activations of each token (Gao et al. 2024, arXiv 2406.04093, equation 2)."""
    return Code(*topk_encode(z, parameters.W_enc, parameters.b_enc, k))


def batch_topk_code(z: Tensor, parameters: Parameters, k: int, tokens: int, reduce: Reduce) -> Code:
    """The k x `tokens` largest positive pre-activations of the batch (Bussmann et al. 2024, arXiv 2412.06410).

    `tokens` counts the batch on all processes, of which `z` [own tokens, d_model] is this one's share. The largest of
    all are among the largest of each process; the smallest of them is found over all processes.
    """
    if reduce is alone:
        return Code(*batch_topk_encode(z, parameters.W_enc, parameters.b_enc, k))
    most = min(math.ceil(k * tokens / max(len(z), 1)), parameters.W_enc.shape[0])
    values, indices = batch_topk_encode(z, parameters.W_enc, parameters.b_enc, most)
    everywhere = gathered(values.detach()[values > 0], reduce)
    if everywhere.numel() > k * tokens:
        least = everywhere.topk(k * tokens, sorted=True).values[-1]
        values = torch.where(values >= least, values, 0.0)
    return Code(values, indices)


def smallest_positive(values: Tensor, reduce: Reduce) -> Tensor:
    """The smallest value above 0 on all processes, []; infinite if there is none."""
    least = torch.where(values > 0, values, math.inf).amin() if values.numel() else values.new_tensor(math.inf)
    return least if reduce is alone else gathered(least.reshape(1), reduce).amin()


def jumprelu_code(z: Tensor, parameters: Parameters, bandwidth: float) -> Code:
    """Pre-activations above their latent's threshold, with straight-through gradients to the thresholds.

    f = v H(v - t) and the number of latents that fire, sum H(v - t), have no useful gradient to a threshold t. With the
    rectangle K(u) = 1 for |u| < 1/2 it is estimated (Rajamanoharan et al. 2024, arXiv 2407.14435, equations 11 and 12):

        df/dt = -(t / bandwidth) K((v - t) / bandwidth)        dH/dt = -(1 / bandwidth) K((v - t) / bandwidth)

    Both need only the entries within half a bandwidth of the threshold, so the code includes these, and no dense
    [tokens, d_sae] matrix is made. A pre-activation of 0 or below counts as outside the window.
    """
    if parameters.log_threshold is None:
        raise UserValueError("these parameters have no thresholds: they are not those of a JumpReLU dictionary")
    threshold = parameters.log_threshold.exp()
    lowest = (threshold.detach() - bandwidth / 2).clamp_min(0.0)
    values, indices = threshold_encode(z, parameters.W_enc, parameters.b_enc, lowest)
    # A gather whose gradient is summed in a fixed order on every device.
    ones = torch.ones_like(values).reshape(-1, 1)
    at = sparse_decode(ones, indices.reshape(-1, 1), threshold[:, None]).view_as(values)
    code, fires = _Jump.apply(values, at, bandwidth)
    return Code(code, indices, fires)


class _Jump(torch.autograd.Function):
    """(v H(v - t), H(v - t)) and the estimated gradients of both."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        fires = values > threshold
        ctx.save_for_backward(values, threshold, fires)
        ctx.bandwidth = bandwidth
        return torch.where(fires, values, 0.0), fires.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, of_code: Tensor, of_fires: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        values, threshold, fires = ctx.saved_tensors
        window = ((values - threshold).abs() < ctx.bandwidth / 2) & (values > 0)
        estimate = -(threshold * of_code + of_fires) / ctx.bandwidth
        return torch.where(fires, of_code, 0.0), torch.where(window, estimate, 0.0), None


@dataclass(frozen=True, eq=False)
class UpdateMetrics:
    """Metrics of one batch, on all processes; scalars on the device, so that nothing waits for them."""

    fvu: Tensor  # Unexplained share of the variance: mean squared error over the variance of the calibration sample
    l0: Tensor  # Latents that fire on a token, on average
    dead: Tensor  # Share of the latents that have not fired for `dead_after` updates
    auxk: Tensor  # Share of the error that dead latents leave unexplained; NaN where it was not computed


class LayerTraining:
    """An SAE in training. All processes hold the same one and call `update` together.

    The loss is the mean squared error of z_hat over the variance of z, plus AuxK (see `auxk_loss`), plus for JumpReLU
    l0_weight (L0 / k - 1)^2 (Rajamanoharan et al. 2024, arXiv 2407.14435, appendix). z is x in the units of training.
    """

    def __init__(self, layer: int, units: Units, config: SAETrainingConfig) -> None:
        self.layer, self.units, self.config = layer, units, config
        device = units.center.device
        self.parameters = Parameters.start(config, units.center.shape[0], device)
        self.silent = torch.zeros(self.parameters.b_enc.shape[0], dtype=torch.int64, device=device)
        """[d_sae] updates since a latent last fired"""
        self.batch_threshold = torch.full((), float("nan"), device=device)
        """batch_topk: running mean of the smallest value that was among the largest of a batch"""
        self.optimizer = torch.optim.Adam(
            list(self.parameters.named().values()),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=device.type in ("cpu", "cuda"),
        )

    def update(self, x: Tensor, tokens: int, step: int, reduce: Reduce = alone) -> UpdateMetrics:
        """Move the parameters by one batch of `tokens` tokens on all processes. `x` [own tokens, d_model] is the share
        of this one, raw, of any float dtype, maybe empty; `step`, from 0, fixes learning rate and k."""
        config, parameters = self.config, self.parameters
        z = self.units.normalized(x)
        if step == 0:
            self._start(z, tokens, reduce)
        code = self._code(z, config.k_at(step), tokens, reduce)
        error = sparse_decode(code.values, code.indices, parameters.W_dec, parameters.b_dec) - z
        squared = error.square().sum()
        size = tokens * z.shape[1]
        loss = squared / (size * self.units.variance)
        total = reduce(squared.detach().clone())
        counts = self._count(code, reduce)
        l0 = counts.sum() / tokens
        if code.fires is not None:
            k = config.k_at(step)
            slope = 2 * config.l0_weight * (l0 / k - 1) / k  # of the penalty, to the mean over all processes
            loss = loss + slope * code.fires.sum() / tokens
        auxk = torch.full_like(total, float("nan"))
        dead = self.dead()
        if config.auxk_weight and step % config.auxk_every == 0:
            ids = dead.nonzero().squeeze(1)
            if ids.numel():
                left = auxk_loss(z, error.detach(), parameters, ids, config.auxk_k or max(1, z.shape[1] // 2))
                share = left / total.clamp_min(torch.finfo(total.dtype).tiny)
                loss = loss + config.auxk_every * config.auxk_weight * share
                auxk = reduce(share.detach().clone())
        self._move(loss, step, reduce)
        if config.architecture == "batch_topk":
            self._follow(smallest_positive(code.values.detach(), reduce))
        return UpdateMetrics(total / (size * self.units.variance), l0, dead.float().mean(), auxk)

    def dead(self) -> Tensor:
        """[d_sae] whether a latent has been silent for more than `dead_after` updates."""
        return self.silent > self.config.dead_after

    def finished(self) -> SparseAutoencoder:
        """The SAE as it is now, in raw units."""
        return fold(self.layer, self.parameters, self.units, self.config, self.batch_threshold)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state of the training: parameters, optimizer, counters, units."""
        state = {name: value.detach() for name, value in self.parameters.named().items()}
        for name, value in self.parameters.named().items():
            state |= {f"adam.{name}.{key}": kept for key, kept in self.optimizer.state.get(value, {}).items()}
        units = (self.units.center, self.units.scale, self.units.variance)
        state |= dict(zip(_UNITS, units, strict=True))
        return state | {"silent": self.silent, "batch_threshold": self.batch_threshold}

    @classmethod
    def resumed(cls, layer: int, tensors: dict[str, Tensor], config: SAETrainingConfig, device: torch.device):  # type: ignore[no-untyped-def]
        """Continue a training from its `tensors()`. ValueError if they are of other settings."""
        training = cls(layer, Units(*(tensors[name].to(device) for name in _UNITS)), config)
        kept: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for number, (name, value) in enumerate(training.parameters.named().items()):
                if name not in tensors or tensors[name].shape != value.shape:
                    raise UserValueError(f"layer {layer}: the checkpoint does not hold {name} {list(value.shape)}")
                value.copy_(tensors[name])
                start = f"adam.{name}."
                of_this = {key.removeprefix(start): t.clone() for key, t in tensors.items() if key.startswith(start)}
                if of_this:
                    kept[number] = of_this
        # Adam knows where each of its tensors belongs: a fused one counts its steps on the parameter's device.
        groups = training.optimizer.state_dict()["param_groups"]
        training.optimizer.load_state_dict({"state": kept, "param_groups": groups})
        training.silent = tensors["silent"].to(device, copy=True)
        training.batch_threshold = tensors["batch_threshold"].to(device, copy=True)
        return training

    def _code(self, z: Tensor, k: int, tokens: int, reduce: Reduce) -> Code:
        if self.config.architecture == "jumprelu":
            return jumprelu_code(z, self.parameters, self.config.bandwidth)
        if self.config.architecture == "batch_topk":
            return batch_topk_code(z, self.parameters, k, tokens, reduce)
        return topk_code(z, self.parameters, k)

    @torch.no_grad()
    def _count(self, code: Code, reduce: Reduce) -> Tensor:
        """Update the counters. Returns how often each latent fired in the batch, [d_sae]."""
        counts = torch.zeros_like(self.silent)
        counts.scatter_add_(0, code.indices.flatten().long(), (code.values > 0).flatten().long())
        counts = reduce(counts)
        self.silent = torch.where(counts > 0, 0, self.silent + 1)
        return counts

    @torch.no_grad()
    def _start(self, z: Tensor, tokens: int, reduce: Reduce) -> None:
        """Scale the encoder so that the first batch is reconstructed best, and put thresholds where k latents fire.

        Tied rows overshoot: each of the k latents that fire carries all of z along its row. The best common factor is
        <z_hat, z> / <z_hat, z_hat>. Without it the first updates would only shrink the encoder, below JumpReLU's
        thresholds.
        """
        parameters, config = self.parameters, self.config
        k = config.k_at(0)
        tied = config.architecture == "topk"
        code = topk_code(z, parameters, k) if tied else batch_topk_code(z, parameters, k, tokens, reduce)
        z_hat = sparse_decode(code.values, code.indices, parameters.W_dec)
        products = reduce(torch.stack(((z_hat * z).sum(), z_hat.square().sum())))
        factor = products[0] / products[1].clamp_min(torch.finfo(z.dtype).tiny)
        factor = torch.where(factor > 0, factor, 1.0)
        parameters.W_enc.mul_(factor)
        if parameters.log_threshold is not None:
            parameters.log_threshold.copy_((factor * smallest_positive(code.values, reduce)).clamp(1e-6, 1e6).log())

    @torch.no_grad()
    def _follow(self, least: Tensor) -> None:
        """Move the running threshold towards that of this batch; start with the first one."""
        decay = self.config.threshold_decay
        moved = torch.where(self.batch_threshold.isnan(), least, decay * self.batch_threshold + (1 - decay) * least)
        self.batch_threshold = torch.where(least.isfinite(), moved, self.batch_threshold)

    def _move(self, loss: Tensor, step: int, reduce: Reduce) -> None:
        """One step of Adam on the gradient of all processes, with decoder rows of norm 1."""
        self.optimizer.zero_grad()
        loss.backward()
        for value in self.parameters.named().values():
            if value.grad is None:
                value.grad = torch.zeros_like(value)
            value.grad = reduce(value.grad)
        W_dec = self.parameters.W_dec
        with torch.no_grad():  # a gradient along a row would only change its norm, which is kept at 1
            W_dec.grad.addcmul_(torch.linalg.vecdot(W_dec.grad, W_dec)[:, None], W_dec, value=-1)  # type: ignore[union-attr, arg-type]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(step)
        self.optimizer.step()
        with torch.no_grad():
            W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))
        self.optimizer.zero_grad()


def auxk_loss(z: Tensor, error: Tensor, parameters: Parameters, dead: Tensor, k: int) -> Tensor:
    """Squared error after the `dead` latents reconstruct the error of the others, []:
    sum |error + sum_dead f_j W_dec_j|^2.

    At most k of them fire on a token (Gao et al. 2024, arXiv 2406.04093, appendix A.2). `error` is z_hat - z of the
    others, [tokens, d_model], without gradient. Divided by sum |error|^2 it is the AuxK loss.
    """
    dead_rows = (parameters.W_enc.index_select(0, dead), parameters.b_enc.index_select(0, dead))
    values, indices = topk_encode(z, *dead_rows, min(k, dead.numel()))
    return (sparse_decode(values, indices, parameters.W_dec.index_select(0, dead)) + error).square().sum()
