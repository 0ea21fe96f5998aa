"""Training of sparse autoencoders, on text (`run`) or, for small models and quick experiments, on activations.

In units z = (x - center) / scale, with the geometric median of the activations as center:

    pre   = W_enc z + b_enc
    f     = topk(pre), batch_topk(pre) or jumprelu(pre)
    z_hat = W_dec^T f + b_dec
    loss  = mean (z_hat - z)^2 / variance + weight * AuxK (+ a penalty on L0 for jumprelu)

Decoder rows keep norm 1. At the end everything is folded into raw units: a canonical `SparseAutoencoder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.report.progress import progress as shown
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.checks import check_finite, check_tensor
from qscope_posttrain.sae.training.config import SAETrainingConfig
from qscope_posttrain.sae.training.parameters import calibrate
from qscope_posttrain.sae.training.update import LayerTraining

__all__ = ["SAETrainingConfig", "train_saes"]


def train_saes(
    activations: Mapping[int, Tensor], config: SAETrainingConfig | None = None, progress: bool | None = None
) -> dict[int, SparseAutoencoder]:
    """Train one SAE per layer.

    Args:
        activations (dict of int to Tensor): Raw outputs of decoder layers, layer -> [tokens, d_model], any float dtype,
            on the device to train on. Leave first tokens and norm outliers out: they would dominate scale and loss.
        config (SAETrainingConfig, default None): Settings; None is `SAETrainingConfig()`.
        progress (bool, default None): Show a progress line per layer; None: on a terminal.

    Returns:
        layer -> SAE in raw units (float32, decoder rows of norm 1). A layer's result depends on its own activations and
        the configuration only, and is reproducible on the same machine and number of threads.

    Example:
        >>> activations = {2: torch.randn(500, 64), 3: torch.randn(500, 64)}
        >>> trained = qp.train_saes(activations, qp.SAETrainingConfig(width=128, k=8, steps=5))
        >>> trained[3].d_sae
        128
    """
    config = SAETrainingConfig() if config is None else config
    for layer, x in activations.items():
        check_tensor(f"activations of layer {layer}", x, (None, None))
        check_finite(f"activations of layer {layer}", x)
        config.latents(x.shape[1])
    return {layer: _train_layer(layer, x, config, progress) for layer, x in activations.items()}


def _train_layer(layer: int, x: Tensor, config: SAETrainingConfig, progress: bool | None) -> SparseAutoencoder:
    training = LayerTraining(layer, calibrate(layer, x), config)
    unexplained = torch.zeros(())
    options: dict[str, Any] = {"total": config.steps, "description": f"training the SAE of layer {layer}"}
    options["note"] = lambda: f"unexplained variance {float(unexplained):.3f}"
    for step, tokens in shown(enumerate(_batches(x.shape[0], config)), enabled=progress, **options):
        unexplained = training.update(x[tokens.to(x.device)], len(tokens), step).fvu
    return training.finished()


def _batches(tokens: int, config: SAETrainingConfig) -> Iterator[Tensor]:
    """`config.steps` batches of token indices; every token is drawn once before any is drawn again."""
    generator = torch.Generator().manual_seed(config.seed)
    size = min(config.batch_tokens, tokens)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(config.steps):
        if order.numel() < size:
            order = torch.cat((order, torch.randperm(tokens, generator=generator)))
        yield order[:size]
        order = order[size:]
