"""Effect of a direction on the log-probability of a language: one backward pass a batch serves all layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.models.batches import TokenBatch
from qscope_posttrain.models.capture import LayerCapture
from qscope_posttrain.models.layers import check_layers, evaluation_mode, pretrained_model
from qscope_posttrain.models.scoring import (
    LOGITS_AT_A_TIME,
    contrast_sample,
    log_masses,
    model_logits,
    predicting_positions,
)
from qscope_posttrain.report.progress import progress


def effect_gradients(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    target: str,
    layers: Sequence[int],
    *,
    show_progress: bool | None = None,
    **options: Any,
) -> dict[int, Tensor]:
    """g = mean over positions of d log P(target tokens) / d h at the output of each layer, {layer: [d_model] fp64}.

    Positions are those of text in the other languages that have a next token. With N of them,
    g = (1/N) sum_s d (sum_t log P_t) / d h_s over all positions s, so that g . d is the derivative of the mean
    log-probability with respect to e when h + e d replaces h at EVERY position: the first-order effect of steering.

    `options` are those of `contrast.contrast_sample`, which chooses texts and tokens. Parameters receive no gradient.
    """
    layers = check_layers(model, layers)
    sample = contrast_sample(model, tokenizer, texts, target, **options)
    total: dict[int, Tensor] = {}
    positions = 0
    with evaluation_mode(model), differentiable_from_the_embedding(model), LayerCapture(model, layers) as capture:
        for batch in progress(sample.batches, description=f"effects on {target}", enabled=show_progress):
            capture.clear()
            gradients = _batch_gradients(model, batch, sample.target_tokens, capture)
            positions += int((batch.lengths - 1).sum())
            for layer, gradient in gradients.items():
                total[layer] = total.get(layer, 0.0) + gradient.double().sum(dim=(0, 1)).cpu()
        capture.clear()
    return {layer: total[layer] / positions for layer in layers}


@torch.enable_grad()
def _batch_gradients(
    model: nn.Module, batch: TokenBatch, target_tokens: Tensor, capture: LayerCapture
) -> dict[int, Tensor]:
    """d (sum of log P over positions) / d h for each captured layer, [batch, length, d_model]."""
    flat = model_logits(model, batch)
    positions, _ = predicting_positions(batch)
    total = flat.new_zeros((), dtype=torch.float32)
    for at in positions.split(max(1, LOGITS_AT_A_TIME // flat.shape[1])):
        log_all, log_target = log_masses(flat.index_select(0, at.to(flat.device)), target_tokens)
        total = total + (log_target - log_all).sum()
    hidden = capture.require()
    return dict(zip(hidden, torch.autograd.grad(total, list(hidden.values())), strict=True))


@contextmanager
def differentiable_from_the_embedding(model: nn.Module) -> Iterator[None]:
    """Let the graph begin at the token embedding, also when every parameter is frozen."""

    def require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)

    handle = pretrained_model(model).get_input_embeddings().register_forward_hook(require_grad)
    try:
        yield
    finally:
        handle.remove()


def measure_effects(
    features: FeatureSet,
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    target: str,
    **options: Any,
) -> FeatureSet:
    """The same FeatureSet with `effects` = decoder . g for the rows of language `target`.

    An effect is the change of the mean log-probability of the target's tokens per unit of the decoder direction.
    Rows of other languages keep what they had. `options` are those of `effect_gradients`.
    """
    features.check_model(model)
    layers = list(features.select(language=target).layers)
    gradients = effect_gradients(model, tokenizer, texts, target, layers, **options)
    measured = dict(features.layers)
    for layer in layers:
        rows = features.layers[layer]
        own = torch.tensor([label == target for label in rows.labels])
        effects = (rows.decoder.double() @ gradients[layer]).float()
        if not bool(effects.isfinite().all()):
            raise UserValueError(f"Layer {layer}: the gradient of log P({target}) is not finite.")
        measured[layer] = replace(rows, effects=torch.where(own, effects, rows.effects))
    return replace(features, layers=measured)
