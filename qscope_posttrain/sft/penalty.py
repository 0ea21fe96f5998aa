"""From a FeatureSet to the few numbers per layer that a training step needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.kernels.penalty import FeaturePenalty, feature_penalty
from qscope_posttrain.sft.config import Combine, SASFTConfig


@dataclass(frozen=True, eq=False)
class PenaltyLayer:
    """R readouts of one decoder layer, already divided by their scale sigma.

    `excess = ReLU(h @ rows.T + bias - thresholds[language])`, which is ReLU((f - alpha) / sigma).
    """

    layer: int
    """Decoder layer, counted from 0"""
    names: tuple[str, ...]
    """One per readout, for the metrics"""
    rows: Tensor
    """[R, d_model] fp32"""
    bias: Tensor
    """[R] fp32"""
    thresholds: Tensor
    """[languages, R] fp32, in the order of the FeatureSet's languages"""

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> PenaltyLayer:
        return replace(
            self, rows=self.rows.to(device), bias=self.bias.to(device), thresholds=self.thresholds.to(device)
        )

    def penalty(
        self, hidden: Tensor, language_ids: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> FeaturePenalty:
        """Sums of every readout's excess over its language's threshold, in at least fp32.

        Args:
            hidden: residual stream `[batch, tokens, d_model]`, with graph.
            language_ids: `[batch, tokens]`; tokens with a negative id must be masked.
            mask: `[batch, tokens]`, bool: tokens that count.
            weights: `[batch, tokens]`, factors of the tokens, or None.
        """
        return feature_penalty(
            hidden, self.rows, self.bias, self.thresholds, mask, groups=language_ids, weights=weights
        )


def penalty_layers(features: FeatureSet, config: SASFTConfig) -> tuple[PenaltyLayer, ...]:
    """The readouts that `config` asks for.

    Raises:
        ValueError: the target, a layer or enough statistics are not in the FeatureSet.
    """
    selected = features.select(language=config.target, layers=config.layers, top=config.top)
    others = [i for i, name in enumerate(selected.languages) if name != config.target]
    if not others:
        raise UserValueError(f"This FeatureSet knows only the target language {config.target!r}; it needs another one.")
    return tuple(_penalty_layer(layer, rows, others, config) for layer, rows in selected.layers.items())


def _penalty_layer(layer: int, features: LayerFeatures, others: list[int], config: SASFTConfig) -> PenaltyLayer:
    if config.combine != "none":
        # The weighted sum of rows is a row again: its mean and variance follow exactly from theirs.
        weights = combination_weights(features, config.combine, layer)
        features = features.combine(weights, name=f"{config.target} {config.combine} of {len(features)}")
    rows, bias, mean, _ = features.readout(config.readout)
    thresholds = torch.zeros_like(mean) if config.threshold == "zero" else mean
    sigma = torch.ones(len(features))
    if config.scale == "std":
        sigma = features.pooled_std(config.readout, others).float()
        if bool((sigma <= 0).any()):
            flat = [features.names[i] for i in (sigma <= 0).nonzero().flatten().tolist()]
            raise UserValueError(f'Layer {layer}: {", ".join(flat)} never varies, so scale="std" is undefined for it.')
    return PenaltyLayer(
        layer=layer,
        names=tuple(f"layer {layer} {name}" for name in features.names),
        rows=(rows / sigma[:, None]).contiguous(),
        bias=bias / sigma,
        thresholds=thresholds / sigma,
    )


def combination_weights(features: LayerFeatures, combine: Combine, layer: int) -> Tensor:
    """Non-negative weights `[F]` that sum to 1; see `SASFTConfig.combine`. A single row, whatever it is, has weight 1.

    Raises:
        ValueError: the FeatureSet lacks the numbers, or none of them is positive.
    """
    if combine == "uniform" or len(features) == 1:
        raw = torch.ones(len(features))
    else:
        raw = features.scores if combine == "monolinguality" else features.effects
        if bool(raw.isnan().any()):
            missing = "scores" if combine == "monolinguality" else "effects"
            remedy = "" if combine == "monolinguality" else " Measure them with features.causal.measure_effects."
            raise UserValueError(f"combine={combine!r} needs the rows' {missing}, unknown for layer {layer}.{remedy}")
    weights = raw.double().clamp(min=0)
    total = float(weights.sum())
    if not math.isfinite(total) or total <= 0:
        raise UserValueError(
            f"combine={combine!r}: no row of layer {layer} has a positive weight ({raw.tolist()}), so there is "
            'nothing to penalise. Select other rows, or use combine="none".'
        )
    return weights / total
