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
from qscope_posttrain.residual.capture import LayerCapture
from qscope_posttrain.residual.layers import final_norm
from qscope_posttrain.sft.anchor import Anchor
from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.checks import TENSOR_PARALLEL, ZERO_3, is_sharded
from qscope_posttrain.sft.config import LanguageOf, SASFTConfig
from qscope_posttrain.sft.logits import LogitHead, check_head, risk_weights
from qscope_posttrain.sft.loss import Normalization
from qscope_posttrain.sft.masks import TokenBatch
from qscope_posttrain.sft.normalisation import Normaliser
from qscope_posttrain.sft.penalty import PenaltyLayer, penalty_layers
from qscope_posttrain.sft.target_tokens import find_target_tokens, fingerprint

FINAL_NORM = "final_norm"


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
            target_token_ids: `[n]` int64, the tokens that write the target language. By default the entries of the
                trainer's tokenizer that write the target's script. Used by risk weights and the anchor only.
            anchor_model: the starting model of the anchor, by default the model without its adapter (PEFT) or a
                frozen copy made at attach, which takes the memory of the model's weights once more. A given one is
                moved to the device of the batches, and otherwise left as it is.
            name: prefix of the metrics, distinct for several callbacks on one trainer.

        Raises:
            ValueError, TypeError, FileNotFoundError: a file, target, layer or option that cannot work.
        """
        config = SASFTConfig(target=target, weight=weight, language=language, normalization=normalization, **options)
        self.config = config
        self.features = features if isinstance(features, FeatureSet) else FeatureSet.load(features)
        self.layers: tuple[PenaltyLayer, ...] = penalty_layers(self.features, config)
        self.target_token_ids = target_token_ids
        self.anchor_model = anchor_model
        self._target_id = self.features.language_index(config.target)
        self._anchor: Anchor | None = None
        self._tokens: Tensor | None = None
        super().__init__(
            name=name,
            weight=weight,
            normalization=normalization,
            languages=self.features.languages,
            language=language,
            ignore_languages=config.ignore_languages,
        )

    @property
    def measures_only(self) -> bool:
        return self.weight == 0 and self.config.anchor_weight == 0

    def prepare(self, trainer: Trainer) -> LayerCapture:
        model: Any = trainer.model
        self.features.check_model(model)
        self._tokens = None
        if self.config.needs_logits:
            check_head(model)
            self._tokens = find_target_tokens(
                trainer, self.config.target, self.target_token_ids, required=self.config.position_weight == "risk"
            )
        scheme = is_sharded(trainer)
        # The others keep DTensors, which `LogitHead` gathers.
        if self.config.position_weight == "risk" and scheme in (ZERO_3, TENSOR_PARALLEL):
            raise UserValueError(
                f'position_weight="risk" reads the output embedding, which under {scheme} is not whole outside of the '
                "model's forward. Use ZeRO-1/2, DDP or FSDP2, or uniform weights."
            )
        if self.config.anchor_weight > 0:
            self._anchor = Anchor.for_trainer(trainer, self.anchor_model)
        self._model: nn.Module = model
        self._on_device: dict[int, PenaltyLayer] = {}
        modules = {FINAL_NORM: final_norm(model)} if self.config.needs_logits else None
        return LayerCapture(model, [layer.layer for layer in self.layers], modules)

    def eligible(self, batch: TokenBatch) -> Tensor:
        if self.normalization == "official":
            return batch.published(self._target_id)
        return batch.eligible(self._target_id, self.config.positions)

    def term(
        self,
        batch: TokenBatch,
        eligible: Tensor,
        capture: LayerCapture,
        normaliser: Normaliser,
        inputs: Mapping[str, Any],
    ) -> tuple[Tensor, list[Tensor]]:
        weights = None
        if self.config.position_weight == "risk":
            head = LogitHead.of(self._model)
            weights = risk_weights(head, capture.named[FINAL_NORM], eligible, self._require_tokens())
        penalty = torch.zeros((), device=eligible.device)
        above = torch.zeros_like(eligible)
        mean_excesses: list[Tensor] = []
        for layer in self.layers:
            hidden = capture.tensors[layer.layer]
            here = hidden.device
            found = self._layer_on(layer, here).penalty(
                hidden, batch.language_ids.to(here), eligible.to(here), None if weights is None else weights.to(here)
            )
            penalty = penalty + normaliser(found.sums.sum(), features=len(layer)).to(penalty.device)
            above |= found.above.to(above.device)
            mean_excesses.append(found.excesses)
        counts = [above.sum(), eligible.sum(), batch.labelled().sum()]
        values = [penalty.detach() * normaliser.logged, *counts, *mean_excesses]
        # With weight 0 and an anchor, the penalty must not even contribute a zero gradient.
        term = self.weight * penalty if self.weight else torch.zeros_like(penalty)
        if self._anchor is not None:
            positions = batch.eligible(self._target_id, "predicting")
            divergence = self._anchor.divergence(
                self._model, inputs, capture.named[FINAL_NORM], positions, self._tokens
            )
            anchor = normaliser(divergence.sum())
            term = term + self.config.anchor_weight * anchor.to(term.device)
            values.append(anchor.detach() * normaliser.logged)
        return term, values

    def window_names(self) -> tuple[str, ...]:
        excesses = tuple(f"excess/{name}" for layer in self.layers for name in layer.names)
        anchor = ("anchor",) if self.config.anchor_weight > 0 else ()
        return ("penalty", "penalised", "eligible", "labelled", *excesses, *anchor)

    def metrics(self, totals: Mapping[str, float], steps: int) -> dict[str, float]:
        ranks = self._running().trainer.accelerator.num_processes
        eligible = max(totals["eligible"], 1)
        values = {
            "penalty": totals["penalty"] / (ranks * steps),
            "penalised_fraction": totals["penalised"] / eligible,
            "eligible_fraction": totals["eligible"] / max(totals["labelled"], 1),
        }
        values |= {key: value / eligible for key, value in totals.items() if key.startswith("excess/")}
        if "anchor" in totals:
            values["anchor"] = totals["anchor"] / (ranks * steps)
        return values

    def identity(self) -> dict[str, Any]:
        tokens = None if self._tokens is None else fingerprint(self._tokens)
        return {
            "config": self.config.to_dict(),
            "features_sha256": self._fingerprint(),
            "target_tokens_sha256": tokens,
        }

    def _fingerprint(self) -> str:
        """Hash of the rows, biases and thresholds in use: the same features give the same hash, wherever they lie."""
        digest = hashlib.sha256()
        for layer in self.layers:
            digest.update(str(layer.layer).encode())
            for tensor in (layer.rows, layer.bias, layer.thresholds):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _layer_on(self, layer: PenaltyLayer, device: torch.device) -> PenaltyLayer:
        """The layer's readouts on the device where its hidden states are; moved once."""
        found = self._on_device.get(layer.layer)
        if found is None or found.rows.device != device:
            found = self._on_device[layer.layer] = layer.to(device)
        return found

    def _require_tokens(self) -> Tensor:
        if self._tokens is None:
            raise RuntimeError("Risk weights need the target's tokens, which prepare() finds; attach(trainer) first.")
        return self._tokens
