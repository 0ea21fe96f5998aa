"""One layer in training: its parameters, its optimiser, its counters, and the update that moves them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qscope_posttrain.distributed import Reduce, alone
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.kernels import sparse_decode, topk_encode
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.training.calibration import Units
from qscope_posttrain.sae.training.codes import Code, batch_topk_code, jumprelu_code, smallest_positive, topk_code
from qscope_posttrain.sae.training.config import SAETrainingConfig
from qscope_posttrain.sae.training.parameters import Parameters, fold, keep_unit_rows, remove_parallel_gradient


@dataclass(frozen=True, eq=False)
class UpdateMetrics:
    """Of one batch, on all processes; scalars on the device, so that nothing waits for them."""

    fvu: Tensor
    """Share of the variance left unexplained: mean squared error over the variance of the calibration sample"""
    l0: Tensor
    """Latents that fire on a token, on average"""
    dead: Tensor
    """Share of the latents that have not fired for `dead_after` updates"""
    auxk: Tensor
    """Share of the error that dead latents leave unexplained; NaN where it was not computed"""

    def tensors(self) -> dict[str, Tensor]:
        return {"fvu": self.fvu, "l0": self.l0, "dead": self.dead, "auxk": self.auxk}


class LayerTraining:
    """A dictionary in training. All processes hold the same one and call `update` together.

    The loss is the mean squared error of z_hat over the variance of z, plus AuxK (see `auxk_loss`), plus for JumpReLU
    l0_weight (L0 / k - 1)^2 (Rajamanoharan et al. 2024, arXiv 2407.14435, appendix). z is x in the units of training.
    """

    def __init__(self, layer: int, units: Units, config: SAETrainingConfig) -> None:
        self.layer, self.units, self.config = layer, units, config
        device = units.centre.device
        self.parameters = Parameters.start(config, units.centre.shape[0], device)
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
        """Move the parameters by one batch.

        Args:
            x: This process' share of the batch, [own tokens, d_model], raw, any float dtype; may be empty.
            tokens: Size of the batch on all processes.
            step: Number of the update, from 0: it fixes learning rate and k.
            reduce: Sum over the processes.
        """
        config, parameters = self.config, self.parameters
        z = self.units.normalised(x)
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
        """The dictionary as it is now, in raw units."""
        return fold(self.layer, self.parameters, self.units, self.config, self.batch_threshold)

    def tensors(self) -> dict[str, Tensor]:
        """All that the next update depends on: parameters, optimiser, counters, units."""
        state = {name: value.detach() for name, value in self.parameters.named().items()}
        for name, value in self.parameters.named().items():
            state |= {f"adam.{name}.{key}": kept for key, kept in self.optimizer.state.get(value, {}).items()}
        state |= {f"units.{name}": value for name, value in self.units.tensors().items()}
        return state | {"silent": self.silent, "batch_threshold": self.batch_threshold}

    @classmethod
    def resumed(cls, layer: int, tensors: dict[str, Tensor], config: SAETrainingConfig, device: torch.device):  # type: ignore[no-untyped-def]
        """A training that goes on from `tensors()` of another. ValueError if they are of other settings."""
        names = ("centre", "scale", "variance")
        training = cls(layer, Units(*(tensors[f"units.{name}"].to(device) for name in names)), config)
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
        """[d_sae] how often each latent fired in the batch; brings the counters up to date."""
        counts = torch.zeros_like(self.silent)
        counts.scatter_add_(0, code.indices.flatten().long(), (code.values > 0).flatten().long())
        counts = reduce(counts)
        self.silent = torch.where(counts > 0, 0, self.silent + 1)
        return counts

    @torch.no_grad()
    def _start(self, z: Tensor, tokens: int, reduce: Reduce) -> None:
        """Scale the encoder so that the first batch is reconstructed best, and put thresholds where k latents fire.

        Tied rows overshoot: each of the k latents that fire carries all of z along its row. The best common factor is
        <z_hat, z> / <z_hat, z_hat>. It spares the updates that would only shrink the encoder, and the thresholds of
        JumpReLU that of being overtaken.
        """
        parameters, config = self.parameters, self.config
        k = config.k_at(0)
        code = topk_code(z, parameters, k) if config.architecture == "topk" else None
        code = batch_topk_code(z, parameters, k, tokens, reduce) if code is None else code
        z_hat = sparse_decode(code.values, code.indices, parameters.W_dec)
        products = reduce(torch.stack(((z_hat * z).sum(), z_hat.square().sum())))
        factor = products[0] / products[1].clamp_min(torch.finfo(z.dtype).tiny)
        factor = torch.where(factor > 0, factor, 1.0)
        parameters.W_enc.mul_(factor)
        if parameters.log_threshold is not None:
            parameters.log_threshold.copy_((factor * smallest_positive(code.values, reduce)).clamp(1e-6, 1e6).log())

    @torch.no_grad()
    def _follow(self, least: Tensor) -> None:
        """Move the running threshold towards that of this batch; the first one is taken as it is."""
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
        remove_parallel_gradient(self.parameters.W_dec)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(step)
        self.optimizer.step()
        keep_unit_rows(self.parameters.W_dec)
        self.optimizer.zero_grad()


def auxk_loss(z: Tensor, error: Tensor, parameters: Parameters, dead: Tensor, k: int) -> Tensor:
    """Squared error that the `dead` latents leave of what the others left, []: sum |error + sum_dead f_j W_dec_j|^2.

    At most k of them fire on a token (Gao et al. 2024, arXiv 2406.04093, appendix A.2). `error` is z_hat - z of the
    others, [tokens, d_model], without gradient. Over sum |error|^2 it is the AuxK loss.
    """
    dead_rows = (parameters.W_enc.index_select(0, dead), parameters.b_enc.index_select(0, dead))
    values, indices = topk_encode(z, *dead_rows, min(k, dead.numel()))
    return (sparse_decode(values, indices, parameters.W_dec.index_select(0, dead)) + error).square().sum()
