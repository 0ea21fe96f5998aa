"""SASFT on a stock `trl.SFTTrainer`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.sft.anchor import Anchor
from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.auxiliary_loss import AuxiliaryLoss, Step
from qscope_posttrain.sft.checks import TENSOR_PARALLEL, ZERO_3, is_sharded
from qscope_posttrain.sft.config import LanguageOf, SASFTConfig
from qscope_posttrain.sft.logits import LogitHead, check_head, risk_weights
from qscope_posttrain.sft.loss import Normalization
from qscope_posttrain.sft.masks import TokenBatch
from qscope_posttrain.sft.penalty import PenaltyLayer, penalty_layers
from qscope_posttrain.sft.target_tokens import find_target_tokens


class SASFTCallback(AuxiliaryLossCallback):
    """Penalises features of a target language on responses in other languages (SASFT, arXiv 2507.14894).

        callback = SASFTCallback(features, target="zh", weight=0.1, language="language")
        trainer = SFTTrainer(..., callbacks=[callback])      # or, after construction: callback.attach(trainer)
        trainer.train()

    The formulas are in `SASFTConfig` (options), `sft.loss` (the penalty) and `sft.normalisation` (its divisor).

    Logged through the trainer's metrics, over the steps since the last log and over all ranks:

        sasft/penalty              the term as it enters a step's loss, without its weight; mean over steps
        sasft/penalised_fraction   share of eligible positions with an excess above 0 in any readout; 0 if none
        sasft/eligible_fraction    share of response tokens that are eligible, i.e. not in the target language
        sasft/excess/<readout>     mean excess per eligible position, in the units of `scale`
        sasft/anchor               the KL term, like sasft/penalty; only with an anchor
        sasft/hook_calls           hook calls per micro-batch and captured module: 1
    """

    def __init__(
        self,
        features: FeatureSet | str | Path,
        target: str = SASFTConfig.target,
        weight: float = SASFTConfig.weight,
        language: str | LanguageOf = SASFTConfig.language,
        normalization: Normalization = SASFTConfig.normalization,
        *,
        target_token_ids: Tensor | None = None,
        anchor_model: nn.Module | None = None,
        name: str = "sasft",
        **options: Any,
    ) -> None:
        """
        Args:
            features: a FeatureSet or the path of its file.
            target, weight, language, normalization, options: the fields of `SASFTConfig`.
            target_token_ids, anchor_model, name: see `AuxiliaryLossCallback`; the first is used by risk weights and
                the anchor only.

        Raises:
            ValueError, TypeError, FileNotFoundError: a file, target, layer or option that cannot work.
        """
        config = SASFTConfig(target=target, weight=weight, language=language, normalization=normalization, **options)
        self.config: SASFTConfig
        self.features = features if isinstance(features, FeatureSet) else FeatureSet.load(features)
        self.layers: tuple[PenaltyLayer, ...] = penalty_layers(self.features, config)
        super().__init__(
            config,
            name=name,
            languages=self.features.languages,
            target_token_ids=target_token_ids,
            anchor_model=anchor_model,
        )

    def prepare(self, trainer: Trainer) -> AuxiliaryLoss:
        config = self.config
        model: Any = trainer.model
        self.features.check_model(model)
        risk, tokens = config.position_weight == "risk", None
        if config.needs_logits:
            check_head(model)
            tokens = find_target_tokens(trainer, config.target, self.target_token_ids, required=risk)
        scheme = is_sharded(trainer)
        # The others keep DTensors, which `LogitHead` gathers.
        if risk and scheme in (ZERO_3, TENSOR_PARALLEL):
            raise UserValueError(
                f'position_weight="risk" reads the output embedding, which under {scheme} is not whole outside of the '
                "model's forward. Use ZeRO-1/2, DDP or FSDP2, or uniform weights."
            )
        anchor = Anchor.for_trainer(trainer, self.anchor_model) if config.anchor_weight > 0 else None
        target_id = self.features.language_index(config.target)
        return _FeaturePenalty(
            trainer, config, target_id=target_id, penalties=self.layers, tokens=tokens, anchor=anchor
        )

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "features_sha256": self._fingerprint()}

    def _fingerprint(self) -> str:
        """Hash of the rows, biases and thresholds in use: the same features give the same hash, wherever they lie."""
        digest = hashlib.sha256()
        for layer in self.layers:
            digest.update(str(layer.layer).encode())
            for tensor in (layer.rows, layer.bias, layer.thresholds):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class _FeaturePenalty(AuxiliaryLoss):
    """The SASFT penalty for one trainer."""

    config: SASFTConfig

    def __init__(
        self,
        trainer: Trainer,
        config: SASFTConfig,
        *,
        target_id: int,
        penalties: tuple[PenaltyLayer, ...],
        tokens: Tensor | None,
        anchor: Anchor | None,
    ) -> None:
        super().__init__(
            trainer,
            config,
            target_id=target_id,
            layers=[layer.layer for layer in penalties],
            tokens=tokens,
            anchor=anchor,
            needs_logits=config.needs_logits,
        )
        self.penalties = list(penalties)

    def eligible(self, batch: TokenBatch) -> Tensor:
        if self.config.normalization == "official":
            return batch.published(self.target_id)
        return batch.eligible(self.target_id, self.config.positions)

    def penalty(self, step: Step) -> tuple[Tensor, list[Tensor]]:
        eligible, weights = step.eligible, None
        if self.config.position_weight == "risk" and self.tokens is not None:
            weights = risk_weights(LogitHead.of(self.model), step.final, eligible, self.tokens)
        penalty = torch.zeros((), device=eligible.device)
        above = torch.zeros_like(eligible)
        mean_excesses: list[Tensor] = []
        for i, layer in enumerate(self.penalties):
            hidden = step.layers[layer.layer]
            here = hidden.device
            if layer.rows.device != here:
                layer = self.penalties[i] = layer.to(here)
            found = layer.penalty(
                hidden,
                step.batch.language_ids.to(here),
                eligible.to(here),
                None if weights is None else weights.to(here),
            )
            penalty = penalty + step.normaliser(found.sums.sum(), features=len(layer)).to(penalty.device)
            above |= found.above.to(above.device)
            mean_excesses.append(found.excesses)
        return penalty, [above.sum(), eligible.sum(), step.batch.labelled().sum(), *mean_excesses]

    def sum_names(self) -> tuple[str, ...]:
        excesses = (f"excess/{name}" for layer in self.penalties for name in layer.names)
        return ("penalised", "eligible", "labelled", *excesses)

    def rates(self, totals: Mapping[str, float]) -> dict[str, float]:
        eligible = max(totals["eligible"], 1)
        values = {
            "penalised_fraction": totals["penalised"] / eligible,
            "eligible_fraction": totals["eligible"] / max(totals["labelled"], 1),
        }
        return values | {key: value / eligible for key, value in totals.items() if key.startswith("excess/")}
