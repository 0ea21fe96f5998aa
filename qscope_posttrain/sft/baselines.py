"""Losses that need no SAE and no FeatureSet, with the interface of SASFT: token penalty, KL anchor alone.

The difference of means and random features are FeatureSets, so they run through `SASFTCallback` itself (see
`features.directions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sft.anchor import sharding_of
from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.auxiliary_loss import FINAL_NORM, AuxiliaryLoss, Step
from qscope_posttrain.sft.config import (
    KLAnchorConfig,
    LanguageOf,
    TokenNormalization,
    TokenPenaltyConfig,
    known_languages,
)
from qscope_posttrain.sft.logits import LogitHead, target_surprise


class TokenPenaltyCallback(AuxiliaryLossCallback):
    """Penalizes probability on tokens of the target language, at non-target positions that predict a response token.

        callback = TokenPenaltyCallback("zh", weight=40.0, anchor_weight=1.0)
        trainer = SFTTrainer(..., callbacks=[callback])      # or, after construction: callback.attach(trainer)

    Options are the fields of `TokenPenaltyConfig`, which has the formula, or all of them in one object, `config`.
    `target_token_ids`, `anchor_model`, `name`: see `AuxiliaryLossCallback`.

    Logged, over the steps since the last log and over all ranks:

        token_penalty/penalty             the term as it enters a step's loss, without its weight; mean over steps
        token_penalty/target_probability  mean of P over the penalized positions
        token_penalty/anchor              the KL term, like the penalty; only with anchor_weight
        token_penalty/hook_calls          hook calls per micro-batch and captured module: 1
    """

    def __init__(
        self,
        target: str = TokenPenaltyConfig.target,
        weight: float = TokenPenaltyConfig.weight,
        language: str | LanguageOf = TokenPenaltyConfig.language,
        normalization: TokenNormalization = TokenPenaltyConfig.normalization,
        *,
        config: TokenPenaltyConfig | None = None,
        target_token_ids: Tensor | None = None,
        anchor_model: nn.Module | None = None,
        name: str = "token_penalty",
        **options: Any,
    ) -> None:
        options |= {"target": target, "weight": weight, "language": language, "normalization": normalization}
        config = TokenPenaltyConfig.of(config, **options)
        super().__init__(config, known_languages(config), name, target_token_ids, anchor_model)

    def prepare(self, trainer: Trainer) -> AuxiliaryLoss:
        return _TokenPenalty(trainer, self)


class KLAnchorCallback(AuxiliaryLossCallback):
    """Holds the model to what it was before training, by the KL divergence at positions that predict a response token.

        callback = KLAnchorCallback(weight=1.0)               # every language; target="zh" leaves Chinese free

    Beside a penalty the same term is `anchor_weight`, an option of `SASFTCallback` and `TokenPenaltyCallback`.
    Options are the fields of `KLAnchorConfig`, which has the formula, or all of them in one object, `config`.
    `target_token_ids`, `anchor_model`, `name`: see `AuxiliaryLossCallback`; without a target the distributions omit
    only tokens that are named there.

    Logged, over the steps since the last log and over all ranks:

        kl_anchor/penalty      the term as it enters a step's loss, without its weight; mean over steps
        kl_anchor/divergence   mean KL per position, in nats
        kl_anchor/hook_calls   hook calls per micro-batch and captured module: 1
    """

    def __init__(
        self,
        weight: float = KLAnchorConfig.weight,
        target: str | None = KLAnchorConfig.target,
        language: str | LanguageOf = KLAnchorConfig.language,
        normalization: TokenNormalization = KLAnchorConfig.normalization,
        *,
        config: KLAnchorConfig | None = None,
        target_token_ids: Tensor | None = None,
        anchor_model: nn.Module | None = None,
        name: str = "kl_anchor",
        **options: Any,
    ) -> None:
        options |= {"target": target, "weight": weight, "language": language, "normalization": normalization}
        config = KLAnchorConfig.of(config, **options)
        super().__init__(config, known_languages(config), name, target_token_ids, anchor_model)

    def prepare(self, trainer: Trainer) -> AuxiliaryLoss:
        return _KLAnchor(trainer, self)


class _TokenPenalty(AuxiliaryLoss):
    """The token penalty for one trainer."""

    config: TokenPenaltyConfig
    needs_tokens = True

    def __init__(self, trainer: Trainer, callback: TokenPenaltyCallback) -> None:
        scheme = sharding_of(trainer)
        if scheme is not None:
            raise UserValueError(
                f"The token penalty needs the whole output embedding with gradient, which no rank holds under {scheme} "
                "outside of the model's forward. Use DDP or ZeRO-1/2."
            )
        super().__init__(trainer, callback)

    def penalty(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        positions, tokens = step.eligible, torch.as_tensor(self.tokens)
        if self.config.skip_target_labels:
            positions = positions & ~torch.isin(step.batch.next_labels(), tokens.to(positions.device))
        hidden = step.named[FINAL_NORM]
        surprise = target_surprise(LogitHead.of(self.model), hidden[positions.to(hidden.device)], tokens)
        probability = -torch.expm1(-surprise.detach())
        return step.normalizer(surprise.sum()), {"probability": probability.sum(), "positions": positions.sum()}

    def rates(self, totals: Mapping[str, list[float]]) -> dict[str, float]:
        return {"target_probability": totals["probability"][0] / max(totals["positions"][0], 1)}


class _KLAnchor(AuxiliaryLoss):
    """The KL anchor alone, for one trainer."""

    needs_anchor = True

    def penalty(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        divergence = self.divergence(step, step.eligible)
        return step.normalizer(divergence.sum()), {
            "divergence": divergence.detach().sum(),
            "positions": step.eligible.sum(),
        }

    def rates(self, totals: Mapping[str, list[float]]) -> dict[str, float]:
        return {"divergence": totals["divergence"][0] / max(totals["positions"][0], 1)}
