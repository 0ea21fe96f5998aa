"""Baselines beside SASFT, with the same interface.

The difference of means and random features are FeatureSets, so they run through `SASFTCallback` itself (see
`features.directions`). What is left is the penalty without an SAE on the tokens of the target language.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.residual.capture import LayerCapture
from qscope_posttrain.residual.layers import decoder_layers, final_norm
from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.callback import FINAL_NORM
from qscope_posttrain.sft.checks import is_sharded
from qscope_posttrain.sft.config import LanguageOf
from qscope_posttrain.sft.logits import LogitHead, check_head, target_surprise
from qscope_posttrain.sft.loss import Normalization
from qscope_posttrain.sft.masks import TokenBatch
from qscope_posttrain.sft.normalisation import Normaliser
from qscope_posttrain.sft.target_tokens import find_target_tokens, fingerprint


class TokenPenaltyCallback(AuxiliaryLossCallback):
    """Penalises probability on tokens of the target language, at non-target positions that predict a response token.

        term = weight * sum_t -log(1 - P_t) / N,     P_t = sum over target tokens v of p(v | position t)

    N as in `normalisation.Normaliser`: "token_mean" or "paper". Logged: `token_penalty/penalty` (the term as it
    enters a step's loss, without its weight), `token_penalty/target_probability` (mean of P over the penalised
    positions), `token_penalty/hook_calls`.
    """

    def __init__(
        self,
        target: str = "zh",
        weight: float = 1.0,
        language: str | LanguageOf = "language",
        normalization: Normalization = "token_mean",
        *,
        languages: tuple[str, ...],
        ignore_languages: tuple[str, ...] = (),
        target_token_ids: Tensor | None = None,
        skip_target_labels: bool = True,
        name: str = "token_penalty",
    ) -> None:
        """
        Args:
            target, weight, language, normalization, ignore_languages, name: as in `SASFTCallback`.
            languages: the languages of the training data, e.g. those of the FeatureSet that this is compared with.
            target_token_ids: `[n]` int64; by default the tokens that write the target's script.
            skip_target_labels: leave out positions whose label is a target token (they stay in N). There the
                cross-entropy asks for what the penalty forbids, with an unbounded gradient: on data in which some
                responses switch, this ruins the target language itself.

        Raises:
            ValueError: an unknown target, weight or normalization.
        """
        if normalization not in ("token_mean", "paper"):
            raise UserValueError(f'The token penalty is normalised by "token_mean" or "paper", got {normalization!r}.')
        if not 0 <= weight < float("inf"):
            raise UserValueError(f"weight must be a finite number of at least 0; got {weight!r}.")
        if target not in languages:
            raise UserValueError(f"The target {target!r} is not among the languages {', '.join(languages)}.")
        self.target = target
        self.target_token_ids = target_token_ids
        self.skip_target_labels = skip_target_labels
        self._target_id = languages.index(target)
        super().__init__(
            name=name,
            weight=float(weight),  # a number of numpy could not be written into a checkpoint's JSON
            normalization=normalization,
            languages=tuple(languages),
            language=language,
            ignore_languages=tuple(ignore_languages),
        )

    def prepare(self, trainer: Trainer) -> LayerCapture:
        scheme = is_sharded(trainer)
        if scheme is not None:
            raise UserValueError(
                f"The token penalty needs the whole output embedding with gradient, which no rank holds under {scheme} "
                "outside of the model's forward. Use DDP or ZeRO-1/2."
            )
        model: Any = trainer.model
        check_head(model)
        self._model: nn.Module = model
        tokens = find_target_tokens(trainer, self.target, self.target_token_ids, required=True)
        self._tokens: Tensor = torch.as_tensor(tokens)
        # A capture has at least one layer; the last one is free, its output feeds the norm anyway.
        last = len(decoder_layers(self._model)) - 1
        return LayerCapture(self._model, [last], {FINAL_NORM: final_norm(self._model)})

    def eligible(self, batch: TokenBatch) -> Tensor:
        return batch.eligible(self._target_id, "predicting")

    def term(
        self,
        batch: TokenBatch,
        eligible: Tensor,
        capture: LayerCapture,
        normaliser: Normaliser,
        inputs: Mapping[str, Any],
    ) -> tuple[Tensor, list[Tensor]]:
        positions = eligible
        if self.skip_target_labels:
            positions = eligible & ~torch.isin(batch.next_labels(), self._tokens.to(eligible.device))
        hidden = capture.named[FINAL_NORM]
        surprise = target_surprise(LogitHead.of(self._model), hidden[positions.to(hidden.device)], self._tokens)
        penalty = normaliser(surprise.sum())
        probability = -torch.expm1(-surprise.detach())
        return self.weight * penalty, [penalty.detach() * normaliser.logged, probability.sum(), positions.sum()]

    def window_names(self) -> tuple[str, ...]:
        return ("penalty", "probability", "positions")

    def metrics(self, totals: Mapping[str, float], steps: int) -> dict[str, float]:
        ranks = self._running().trainer.accelerator.num_processes
        return {
            "penalty": totals["penalty"] / (ranks * steps),
            "target_probability": totals["probability"] / max(totals["positions"], 1),
        }

    def identity(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "weight": self.weight,
            "normalization": self.normalization,
            "skip_target_labels": self.skip_target_labels,
            "target_tokens_sha256": fingerprint(self._tokens),
        }
