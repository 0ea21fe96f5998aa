"""What is learnt for one layer, in the units of training, and what becomes of it in raw units."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from qscope_posttrain.sae.activations import Activation, BatchTopK, JumpReLU, TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.source import SAESource
from qscope_posttrain.sae.training.calibration import Units
from qscope_posttrain.sae.training.config import SAETrainingConfig


@dataclass(eq=False)
class Parameters:
    """pre = W_enc z + b_enc; z_hat = W_dec^T f + b_dec. fp32, each requires a gradient."""

    W_enc: Tensor
    """[d_sae, d_model]"""
    b_enc: Tensor
    """[d_sae]"""
    W_dec: Tensor
    """[d_sae, d_model], rows of norm 1"""
    b_dec: Tensor
    """[d_model]"""
    log_threshold: Tensor | None = None
    """[d_sae], jumprelu only"""

    @classmethod
    def start(cls, config: SAETrainingConfig, d_model: int, device: torch.device) -> Parameters:
        """Encoder and decoder the same random rows of norm 1, biases 0: the origin of z is the geometric median."""
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
        """The tensors that there are, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}


@torch.no_grad()
def keep_unit_rows(W_dec: Tensor) -> None:
    """Decoder rows back to norm 1, in place."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))


@torch.no_grad()
def remove_parallel_gradient(W_dec: Tensor) -> None:
    """Take out of W_dec's gradient what would only change the norm of a row (of norm 1), in place."""
    if W_dec.grad is not None:
        along = torch.linalg.vecdot(W_dec.grad, W_dec)
        W_dec.grad.addcmul_(along[:, None], W_dec, value=-1)


@torch.no_grad()
def fold(
    layer: int, parameters: Parameters, units: Units, config: SAETrainingConfig, batch_threshold: Tensor
) -> SparseAutoencoder:
    """The dictionary in raw units.

    With z = (x - centre) / scale, a raw pre-activation is scale times that of training, so that decoder rows keep norm
    1: b_enc' = scale b_enc - W_enc centre, b_dec' = centre + scale b_dec, and thresholds are multiplied by scale.
    """
    scale, centre = units.scale, units.centre
    activation: Activation = TopK(config.k)
    if parameters.log_threshold is not None:
        activation = JumpReLU(scale * parameters.log_threshold.exp())
    elif config.architecture == "batch_topk":
        threshold = float(scale * batch_threshold)
        activation = BatchTopK(threshold if math.isfinite(threshold) else 0.0)
    W_enc = parameters.W_enc.detach().clone()
    return SparseAutoencoder(
        W_enc=W_enc,
        b_enc=scale * parameters.b_enc - W_enc @ centre,
        W_dec=parameters.W_dec.detach().clone(),
        b_dec=centre + scale * parameters.b_dec,
        activation=activation,
        layer=layer,
        source=SAESource("trained here"),
    )
