"""SASFT on a trainer of transformers or TRL."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.kernels.penalty import feature_penalty
from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.auxiliary_loss import AuxiliaryLoss, Step
from qscope_posttrain.sft.config import Combine, LanguageOf, SASFTConfig
from qscope_posttrain.sft.loss import Normalization
from qscope_posttrain.sft.masks import TokenBatch

MEASURED = 16
"""Micro-batches after each log in which the residual stream is compared with that of the features' texts"""
FEWEST_TOKENS = 100  # Eligible tokens since the last log from which on their agreement is known
OUTLIER_FACTOR = 10.0  # Norm of an outlier in median norms, as in the statistics that features come from


class SASFTCallback(AuxiliaryLossCallback):
    """Penalizes features of a target language on responses in other languages (SASFT, arXiv 2507.14894).

    Give it to the trainer (`callbacks=[callback]`), or to one that exists (`callback.attach(trainer)`). The formulas
    are in `SASFTConfig` (options) and `sft.loss` (the penalty and its divisor).

    Logged through the trainer's metrics, over the steps since the last log and over all ranks:

        sasft/penalty              the term as it enters a step's loss, without its weight; mean over steps
        sasft/penalised_fraction   share of eligible positions with an excess above 0 in any readout; 0 if none
        sasft/eligible_fraction    share of response tokens that are eligible, i.e. not in the target language
        sasft/excess/<readout>     mean excess per eligible position, in the units of `scale`
        sasft/displacement/<layer> distance of the mean residual on eligible tokens from that of the features' texts, in
                                   lengths of the latter: small on their model, above 0.8 (a warning) on another
        sasft/anchor               the KL term, like sasft/penalty; only with an anchor
        sasft/hook_calls           hook calls per micro-batch and captured module: 1

    Example:
        >>> callback = qp.SASFTCallback(features, target="zh", weight=0.1, language="language")
        >>> trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback])
        >>> _ = trainer.train()
        >>> "sasft/penalty" in trainer.state.log_history[0]
        True
    """

    def __init__(
        self,
        features: FeatureSet | str | Path,
        target: str = SASFTConfig.target,
        weight: float = SASFTConfig.weight,
        language: str | LanguageOf = SASFTConfig.language,
        normalization: Normalization = SASFTConfig.normalization,
        *,
        config: SASFTConfig | None = None,
        target_token_ids: Tensor | None = None,
        anchor_model: nn.Module | None = None,
        name: str = "sasft",
        **options: Any,
    ) -> None:
        """
        Args:
            features (FeatureSet or path): A FeatureSet or the path of its file.
            target (str, default "zh"): Language to keep out of responses in other languages.
            weight (float, default 0.1): Factor of the penalty in the loss; the penalty is in standard deviations.
            language (str or callable, default "language"): Column with a sample's language, "script" to decide by its
                letters, or a function of the example.
            normalization (str, default "token_mean"): Divisor of the penalty, see `sasft_loss`.
            config (SASFTConfig, default None): All of its fields in one object, instead of options.
            options: the other fields of `SASFTConfig`.
            target_token_ids (Tensor, default None): Tokens that count as the target's, of use to the anchor alone;
                None: those that write its script.
            anchor_model (nn.Module, default None): See `AuxiliaryLossCallback`.
            name (str, default "sasft"): Prefix of the metrics.

        Raises:
            ValueError, TypeError, FileNotFoundError: a file, target, layer or option that cannot work.
        """
        options |= {"target": target, "weight": weight, "language": language, "normalization": normalization}
        config = SASFTConfig.of(config, **options)
        self.features = FeatureSet.load(features)
        self.layers: tuple[PenaltyLayer, ...] = penalty_layers(self.features, config)
        super().__init__(config, self.features.languages, name, target_token_ids, anchor_model)

    def prepare(self, trainer: Trainer) -> AuxiliaryLoss:
        model: Any = trainer.model
        self.features.check_model(model)
        return _FeaturePenalty(trainer, self)

    def identity(self) -> dict[str, Any]:
        # The same features give the same hash, wherever they are stored.
        digest = hashlib.sha256()
        for layer in self.layers:
            digest.update(str(layer.layer).encode())
            for tensor in (layer.rows, layer.bias, layer.thresholds):
                digest.update(tensor.contiguous().numpy().tobytes())
        return {**super().identity(), "features_sha256": digest.hexdigest()}


class _FeaturePenalty(AuxiliaryLoss):
    """The SASFT penalty for one trainer."""

    config: SASFTConfig

    def __init__(self, trainer: Trainer, callback: SASFTCallback) -> None:
        super().__init__(trainer, callback, [layer.layer for layer in callback.layers])
        self.penalties = list(callback.layers)
        self._to_measure = 0
        self._not_measured = torch.zeros(sum(layer.means.shape[1] + 2 for layer in self.penalties))

    def begin(self) -> None:
        super().begin()
        self._to_measure = MEASURED

    def eligible(self, batch: TokenBatch) -> Tensor:
        if self.config.normalization == "official":
            return batch.published(self.target_id)
        return batch.eligible(self.target_id, self.config.positions)

    def penalty(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        eligible = step.eligible
        penalty = torch.zeros((), device=eligible.device)
        above = torch.zeros_like(eligible)
        excesses: list[Tensor] = []
        shifts: list[Tensor] = []
        for i, layer in enumerate(self.penalties):
            hidden = step.layers[layer.layer]
            here = hidden.device
            if layer.rows.device != here:
                layer = self.penalties[i] = layer.to(here)
            mask, groups = eligible.to(here), step.batch.language_ids.to(here)
            found = feature_penalty(hidden, layer.rows, layer.bias, layer.thresholds, mask, groups=groups)
            penalty = penalty + step.normalizer(found.sums.sum(), len(found.sums)).to(penalty.device)
            above |= found.above.to(above.device)
            excesses.append(found.sums.detach())
            if self._to_measure > 0:
                shifts.append(shift(hidden, layer, mask, groups).to(eligible.device))
        self._to_measure -= 1
        self._not_measured = self._not_measured.to(eligible.device)
        counts = {"penalized": above.sum(), "eligible": eligible.sum(), "labeled": step.batch.labeled().sum()}
        counts["shift"] = torch.cat(shifts) if shifts else self._not_measured
        return penalty, {**counts, "excess": torch.cat([excess.to(eligible.device) for excess in excesses])}

    def rates(self, totals: Mapping[str, list[float]]) -> dict[str, float]:
        self._to_measure = MEASURED
        eligible, names = max(totals["eligible"][0], 1), [name for layer in self.penalties for name in layer.names]
        return {
            "penalised_fraction": totals["penalized"][0] / eligible,
            "eligible_fraction": totals["eligible"][0] / max(totals["labeled"][0], 1),
            **{f"excess/{name}": sum_ / eligible for name, sum_ in zip(names, totals["excess"], strict=True)},
            **displacements(self.penalties, totals["shift"]),
        }


@dataclass(frozen=True, eq=False)
class PenaltyLayer:
    """R readouts of one decoder layer, already divided by their scale sigma.

    `excess = ReLU(h @ rows.T + bias - thresholds[language])`, which is ReLU((f - alpha) / sigma).
    """

    layer: int  # Decoder layer, counted from 0
    names: tuple[str, ...]  # One per readout, for the metrics
    rows: Tensor  # [R, d_model] fp32
    bias: Tensor  # [R] fp32
    thresholds: Tensor  # [languages, R] fp32, in the order of the FeatureSet's languages
    means: Tensor  # [languages, d_model] fp32: mean residuals of the texts that the features were found on
    norm_limit: float  # Norm of a residual above which it is an outlier, left out of the means

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> PenaltyLayer:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@torch.no_grad()
def shift(hidden: Tensor, layer: PenaltyLayer, mask: Tensor, groups: Tensor) -> Tensor:
    """[d_model + 2]: sum of h - m over the tokens of `mask` but for outliers, their number, and their sum of m . m.
    Where most tokens are outliers, the stream has grown or is another model's, and all of them count.

    m is the mean residual of a token's language in the texts that the features were found on."""
    within = mask & (torch.linalg.vector_norm(hidden, dim=-1) <= layer.norm_limit)
    kept = torch.where(2 * within.sum() < mask.sum(), mask, within).flatten().float()
    of_language = torch.zeros_like(layer.means[:, 0]).index_add_(0, groups.clamp(min=0).flatten(), kept)
    count = kept.sum()
    share = (kept / count.clamp(min=1)).to(hidden.dtype)  # a sum may overflow in fp16
    total = count * (share @ hidden.flatten(0, 1)).float() - of_language @ layer.means
    return torch.cat([total, torch.stack([count, of_language @ layer.means.square().sum(1)])])


def displacements(layers: Sequence[PenaltyLayer], shifts: Sequence[float]) -> dict[str, float]:
    """By layer, the distance of the mean residual from that of the features' texts, as a share of the latter's length;
    from the summed `shift` of the layers, one behind the other. Layers with few tokens are left out."""
    found = {}
    for layer, (*total, count, square) in zip(layers, torch.tensor(shifts).view(len(layers), -1).tolist(), strict=True):
        if count >= FEWEST_TOKENS and square > 0:
            found[f"displacement/layer {layer.layer}"] = math.hypot(*total) / math.sqrt(count * square)
    return found


def penalty_layers(features: FeatureSet, config: SASFTConfig) -> tuple[PenaltyLayer, ...]:
    """The readouts that `config` asks for; ValueError for what is not in the FeatureSet."""
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
    limit = OUTLIER_FACTOR * features.residual_median_norm
    return PenaltyLayer(
        layer=layer,
        names=tuple(f"layer {layer} {name}" for name in features.names),
        rows=(rows / sigma[:, None]).contiguous(),
        bias=bias / sigma,
        thresholds=thresholds / sigma,
        means=features.mean_residual,
        norm_limit=math.inf if math.isnan(limit) else limit,
    )


def combination_weights(features: LayerFeatures, combine: Combine, layer: int) -> Tensor:
    """Non-negative weights `[F]` that sum to 1; see `SASFTConfig.combine`. A single feature has weight 1."""
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
            'nothing to penalize. Select other rows, or use combine="none".'
        )
    return weights / total
