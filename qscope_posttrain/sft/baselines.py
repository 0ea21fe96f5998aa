"""Losses beside SASFT that need no SAE and no FeatureSet, with the same interface: token penalty, KL anchor alone.

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
from qscope_posttrain.models.target_tokens import find_target_tokens
from qscope_posttrain.sft.anchor import Anchor
from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.attachment_checks import is_sharded
from qscope_posttrain.sft.auxiliary_loss import AuxiliaryLoss, Step
from qscope_posttrain.sft.config import (
    KLAnchorConfig,
    LanguageOf,
    TokenNormalization,
    TokenPenaltyConfig,
    known_languages,
)
from qscope_posttrain.sft.logits import LogitHead, check_head, target_surprise


class TokenPenaltyCallback(AuxiliaryLossCallback):
    """Penalises probability on tokens of the target language, at non-target positions that predict a response token.

    The formula is in `TokenPenaltyConfig` (options). Logged, over the steps since the last log and over all ranks:

        token_penalty/penalty             the term as it enters a step's loss, without its weight; mean over steps
        token_penalty/target_probability  mean of P over the penalised positions
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
            options: the other fields of `TokenPenaltyConfig`.
            target_token_ids (Tensor, default None): Tokens that count as the target's; None: those that write its
                script.
            anchor_model (nn.Module, default None): See `AuxiliaryLossCallback`.
            name (str, default "token_penalty"): Prefix of the metrics.

        Raises:
            ValueError, TypeError: an option that cannot work.
        """
        config = TokenPenaltyConfig(
            target=target, weight=weight, language=language, normalization=normalization, **options
        )
        self.config: TokenPenaltyConfig
        super().__init__(
            config,
            name=name,
            languages=known_languages(config),
            target_token_ids=target_token_ids,
            anchor_model=anchor_model,
        )

    def prepare(self, trainer: Trainer) -> AuxiliaryLoss:
        config = self.config
        scheme = is_sharded(trainer)
        if scheme is not None:
            raise UserValueError(
                f"The token penalty needs the whole output embedding with gradient, which no rank holds under {scheme} "
                "outside of the model's forward. Use DDP or ZeRO-1/2."
            )
        model: Any = trainer.model
        check_head(model)
        tokens = find_target_tokens(trainer, config.target, self.target_token_ids, required=True)
        anchor = Anchor.for_trainer(trainer, self.anchor_model) if config.anchor_weight > 0 else None
        target_id = self.languages.index(config.target)
        return _TokenPenalty(trainer, config, target_id=target_id, tokens=tokens, anchor=anchor)


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
            options: the other fields of `KLAnchorConfig`.
            target_token_ids (Tensor, default None): Tokens that are left out of the distributions; None: those that
                write the target's script, and none without a target.
            anchor_model (nn.Module, default None): See `AuxiliaryLossCallback`.
            name (str, default "kl_anchor"): Prefix of the metrics.

        Raises:
            ValueError, TypeError: an option that cannot work.
        """
        config = KLAnchorConfig(target=target, weight=weight, language=language, normalization=normalization, **options)
        self.config: KLAnchorConfig
        super().__init__(
            config,
            name=name,
            languages=known_languages(config),
            target_token_ids=target_token_ids,
            anchor_model=anchor_model,
        )

    def prepare(self, trainer: Trainer) -> AuxiliaryLoss:
        target, given = self.config.target, self.target_token_ids
        model: Any = trainer.model
        check_head(model)
        tokens = None
        if target is not None or given is not None:
            tokens = find_target_tokens(trainer, target or "the anchor", given, required=False)
        anchor = Anchor.for_trainer(trainer, self.anchor_model)
        target_id = None if target is None else self.languages.index(target)
        return _KLAnchor(trainer, self.config, target_id=target_id, tokens=tokens, anchor=anchor)


class _TokenPenalty(AuxiliaryLoss):
    """The token penalty for one trainer."""

    config: TokenPenaltyConfig

    def penalty(self, step: Step) -> tuple[Tensor, list[Tensor]]:
        positions, tokens = step.eligible, torch.as_tensor(self.tokens)
        if self.config.skip_target_labels:
            positions = positions & ~torch.isin(step.batch.next_labels(), tokens.to(positions.device))
        hidden = step.final
        surprise = target_surprise(LogitHead.of(self.model), hidden[positions.to(hidden.device)], tokens)
        probability = -torch.expm1(-surprise.detach())
        return step.normaliser(surprise.sum()), [probability.sum(), positions.sum()]

    def sum_names(self) -> tuple[str, ...]:
        return ("probability", "positions")

    def rates(self, totals: Mapping[str, float]) -> dict[str, float]:
        return {"target_probability": totals["probability"] / max(totals["positions"], 1)}


class _KLAnchor(AuxiliaryLoss):
    """The KL anchor alone, for one trainer."""

    config: KLAnchorConfig

    def penalty(self, step: Step) -> tuple[Tensor, list[Tensor]]:
        divergence = self.divergence(step, step.eligible)
        return step.normaliser(divergence.sum()), [divergence.detach().sum(), step.eligible.sum()]

    def sum_names(self) -> tuple[str, ...]:
        return ("divergence", "positions")

    def rates(self, totals: Mapping[str, float]) -> dict[str, float]:
        return {"divergence": totals["divergence"] / max(totals["positions"], 1)}
