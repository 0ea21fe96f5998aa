"""Losses that need no SAE and no FeatureSet, with the interface of SASFT: token penalty, KL anchor alone.

The difference of means and random features are FeatureSets, so they run through `SASFTCallback` itself (see
`features.build`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.auxiliary_loss import FINAL_NORM, AuxiliaryLoss, Step
from qscope_posttrain.sft.config import (
    KLAnchorConfig,
    LanguageOf,
    TokenNormalization,
    TokenPenaltyConfig,
    known_languages,
)
from qscope_posttrain.sft.logits import target_surprise


class TokenPenaltyCallback(AuxiliaryLossCallback):
    """Penalizes probability on tokens of the target language, at non-target positions that predict a response token.

    The formula is in `TokenPenaltyConfig` (options). Logged, over the steps since the last log and over all ranks:

        token_penalty/penalty             the term as it enters a step's loss, without its weight; mean over steps
        token_penalty/target_probability  mean of P over the penalized positions
        token_penalty/anchor              the KL term, like the penalty; only with anchor_weight
        token_penalty/hook_calls          hook calls per micro-batch and captured module: 1

    Example:
        >>> callback = qp.TokenPenaltyCallback("zh", weight=40.0, anchor_weight=1.0)
        >>> trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback])
        >>> _ = trainer.train()
        >>> 0 < trainer.state.log_history[0]["token_penalty/target_probability"] < 1
        True
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
        """
        Args:
            target (str, default "zh"): Language whose tokens are penalized in responses in other languages.
            weight (float, default 20.0): Factor of the penalty, which is in nats, in the loss.
            language (str or callable, default "language"): Column with a sample's language, "script" to decide by its
                letters, or a function of the example.
            normalization (str, default "token_mean"): Divisor of the penalty, "token_mean" or "paper".
            config (TokenPenaltyConfig, default None): All of its fields in one object, instead of options.
            options: the other fields of `TokenPenaltyConfig`.
            target_token_ids (Tensor, default None): Tokens that count as the target's; None: those that write its
                script.
            anchor_model (nn.Module, default None): See `AuxiliaryLossCallback`.
            name (str, default "token_penalty"): Prefix of the metrics.

        Raises:
            ValueError, TypeError: an option that cannot work.
        """
        options |= {"target": target, "weight": weight, "language": language, "normalization": normalization}
        config = TokenPenaltyConfig.of(config, **options)
        super().__init__(config, known_languages(config), name, target_token_ids, anchor_model)

    def prepare(self, trainer: Trainer) -> AuxiliaryLoss:
        return _TokenPenalty(trainer, self)


class KLAnchorCallback(AuxiliaryLossCallback):
    """Holds the model to what it was before training, by the KL divergence at positions that predict a response token.

    Beside a penalty the same term is `anchor_weight`, an option of `SASFTCallback` and `TokenPenaltyCallback`.
    The formula is in `KLAnchorConfig` (options). Logged, over the steps since the last log and over all ranks:

        kl_anchor/penalty      the term as it enters a step's loss, without its weight; mean over steps
        kl_anchor/divergence   mean KL per position, in nats
        kl_anchor/hook_calls   hook calls per micro-batch and captured module: 1

    Example:
        >>> callback = qp.KLAnchorCallback(weight=1.0)  # every language; target="zh" leaves Chinese free
        >>> trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback])
        >>> _ = trainer.train()
        >>> "kl_anchor/divergence" in trainer.state.log_history[0]
        True
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
        """
        Args:
            weight (float, default 1.0): Factor of the divergence, which is in nats, in the loss.
            target (str, default None): Language that is left free; None holds the model in every language.
            language (str or callable, default "language"): Column with a sample's language, "script" to decide by its
                letters, or a function of the example; read only with a target.
            normalization (str, default "token_mean"): Divisor of the divergence, "token_mean" or "paper".
            config (KLAnchorConfig, default None): All of its fields in one object, instead of options.
            options: the other fields of `KLAnchorConfig`.
            target_token_ids (Tensor, default None): Tokens that are left out of the distributions; None: those that
                write the target's script, and none without a target.
            anchor_model (nn.Module, default None): See `AuxiliaryLossCallback`.
            name (str, default "kl_anchor"): Prefix of the metrics.

        Raises:
            ValueError, TypeError: an option that cannot work.
        """
        options |= {"target": target, "weight": weight, "language": language, "normalization": normalization}
        config = KLAnchorConfig.of(config, **options)
        super().__init__(config, known_languages(config), name, target_token_ids, anchor_model)

    def prepare(self, trainer: Trainer) -> AuxiliaryLoss:
        return _KLAnchor(trainer, self)


class _TokenPenalty(AuxiliaryLoss):
    """The token penalty for one trainer."""

    config: TokenPenaltyConfig
    needs_tokens = True

    def penalty(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        positions, tokens = step.eligible, torch.as_tensor(self.tokens)
        if self.config.skip_target_labels:
            positions = positions & ~torch.isin(step.batch.next_labels(), tokens.to(positions.device))
        hidden = step.named[FINAL_NORM]
        surprise = target_surprise(self.head, hidden[positions.to(hidden.device)], tokens)
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
