"""The term that a callback adds to the loss of one trainer, and everything that it keeps for this trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.capture import LayerCapture
from qscope_posttrain.models.layers import decoder_layers, final_norm
from qscope_posttrain.models.target_tokens import fingerprint
from qscope_posttrain.sft.anchor import Anchor
from qscope_posttrain.sft.config import LossConfig
from qscope_posttrain.sft.logits import check_head
from qscope_posttrain.sft.masks import TokenBatch
from qscope_posttrain.sft.normalization import Normaliser

if TYPE_CHECKING:
    from accelerate import Accelerator


FINAL_NORM = "final_norm"


@dataclass(frozen=True, eq=False)
class Step:
    """One micro-batch after the model's forward; hidden states are `[batch, tokens, d_model]`, with their graph."""

    batch: TokenBatch
    eligible: Tensor
    """Positions that the term acts on, bool `[batch, tokens]`"""
    layers: Mapping[int, Tensor]
    """Outputs of the captured decoder layers"""
    named: Mapping[str, Tensor]
    """Outputs of the captured modules"""
    normaliser: Normaliser
    inputs: Mapping[str, Any]
    """The batch as the collator made it, without the languages"""

    @property
    def final(self) -> Tensor:
        """The final norm's output."""
        return self.named[FINAL_NORM]


class AuxiliaryLoss(ABC):
    """`weight * term`, and with `anchor_weight` the KL anchor beside it, for one trainer.

    What belongs to a trainer (its model, hooks, tokens, starting model) lives here, and never in the callback, so that
    one callback serves several trainers.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: LossConfig,
        *,
        target_id: int | None,
        layers: Iterable[int] = (),
        tokens: Tensor | None = None,
        anchor: Anchor | None = None,
        needs_logits: bool = True,
    ) -> None:
        """
        Args:
            trainer: its model is read and checked; nothing is changed.
            config: the settings.
            target_id: index of the target language, None if there is none.
            layers: decoder layers to capture; by default the last, whose output feeds the norm anyway.
            tokens: `[n]`, the tokens of the target language, where they are needed.
            anchor: the starting model, where the divergence from it is needed.
            needs_logits: whether to capture the final norm's output.
        """
        model: Any = trainer.model
        if needs_logits:
            check_head(model)
        self.config = config
        self.model: nn.Module = model
        self.target_id = target_id
        self.tokens = tokens
        self.anchor = anchor
        chosen = tuple(layers) or (len(decoder_layers(model)) - 1,)
        self.capture = LayerCapture(model, chosen, {FINAL_NORM: final_norm(model)} if needs_logits else None)
        self.capture.active = False

    # What a subclass gives

    @abstractmethod
    def penalty(self, step: Step) -> tuple[Tensor, list[Tensor]]:
        """The normalised term without its weight, and its further sums over this micro-batch."""

    @abstractmethod
    def sum_names(self) -> tuple[str, ...]:
        """Names of the sums that `penalty` returns."""

    @abstractmethod
    def rates(self, totals: Mapping[str, float]) -> dict[str, float]:
        """What to log beside the terms, from sums over a logging window and over all ranks."""

    def eligible(self, batch: TokenBatch) -> Tensor:
        """Positions that the term acts on, bool `[batch, tokens]`; what "paper" normalisation counts."""
        return batch.eligible(self.target_id, "predicting")

    # What all have

    def value(self, step: Step) -> tuple[Tensor, list[Tensor]]:
        """The scalar to add to the loss, weights included, and the window's values in the order of `window_names`."""
        weight, anchor_weight = self.config.weight, self.config.anchor
        # A term that only measures must not even contribute a zero gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            penalty, sums = self.penalty(step)
        term = weight * penalty if weight else torch.zeros_like(penalty)
        values = [penalty.detach() * step.normaliser.logged, *sums]
        if anchor_weight > 0:
            anchor = step.normaliser(self.divergence(step, step.batch.eligible(self.target_id, "predicting")).sum())
            term = term + anchor_weight * anchor.to(term.device)
            values.append(anchor.detach() * step.normaliser.logged)
        return term, values

    def divergence(self, step: Step, positions: Tensor) -> Tensor:
        """`KL(start || model)` at `positions`, over all tokens but the target's if these are known; `[positions]`."""
        if self.anchor is None:
            raise RuntimeError("The divergence needs a starting model, which this loss was made without.")
        return self.anchor.divergence(self.model, step.inputs, step.final, positions, self.tokens)

    def window_names(self) -> tuple[str, ...]:
        return ("penalty", *self.sum_names(), *(("anchor",) if self.config.anchor > 0 else ()))

    def metrics(self, totals: Mapping[str, float], steps: int, ranks: int) -> dict[str, float]:
        """Values to log, from sums over a logging window of `steps` optimiser steps and over `ranks` processes."""
        terms = {name: totals[name] / (ranks * steps) for name in ("penalty", "anchor") if name in totals}
        return terms | self.rates(totals)

    def identity(self) -> dict[str, Any]:
        """Values that a resumed run must find again, beside the callback's settings."""
        found = {"target_tokens_sha256": None if self.tokens is None else fingerprint(self.tokens)}
        return found if self.anchor is None else {**found, "start_sha256": self.anchor.fingerprint(self.model)}

    def captured(self, labels: Tensor) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """The captured tensors, by layer and by name, at the positions of `labels` `[batch, tokens]`.

        Virtual tokens, which PEFT puts before every row inside the model (prompt tuning, p-tuning), are left out.

        Raises:
            RuntimeError: a hook has not fired.
            ValueError: hidden states and labels differ in shape.
        """
        self.capture.require()
        prompt: Any = getattr(self.model, "active_peft_config", None)
        virtual = int(prompt.num_virtual_tokens) if prompt is not None and prompt.is_prompt_learning else 0

        def at_labels(hidden: Tensor) -> Tensor:
            before = hidden.shape[1] - labels.shape[1] if hidden.ndim == 3 else 0
            kept = hidden[:, before:] if before and before == virtual else hidden
            if kept.ndim != 3 or kept.shape[:2] != labels.shape:
                raise UserValueError(
                    f"The model's hidden states are {list(hidden.shape)} and the labels of the batch "
                    f"{list(labels.shape)}, so it is unknown which position belongs to which label. Expected are "
                    "[batch, tokens, d_model] and [batch, tokens]. The model or a wrapper around it adds or drops "
                    "tokens (virtual prompt tokens, image tokens), repeats rows, or has several residual streams, or "
                    "a compute_loss changes the batch. Train without that, or without this callback."
                )
            return kept

        layers = {layer: at_labels(hidden) for layer, hidden in self.capture.tensors.items()}
        return layers, {name: at_labels(hidden) for name, hidden in self.capture.named.items()}


class MetricWindow:
    """Running sums of named vectors, without a synchronisation with the host until `totals()`.

    `names` fixes what is summed and in what order, so that all ranks hold the same vector, also a rank that has seen
    no token of interest.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums: Tensor | None = None

    def add(self, values: Sequence[Tensor]) -> None:
        """Add one micro-batch: scalars and vectors on one device that, in this order, cover `names`."""
        flat = torch.cat([value.detach().reshape(-1).float() for value in values])
        if flat.numel() != len(self.names):
            raise UserValueError(f"Expected {len(self.names)} values for {', '.join(self.names)}; got {flat.numel()}.")
        # Token counts of a long window pass 2**24, where fp32 stops counting.
        flat = flat.to(_sum_dtype(flat.device))
        self._sums = flat if self._sums is None else self._sums + flat

    def totals(self, accelerator: Accelerator) -> dict[str, float]:
        """Sums over the window and over all ranks, by name; then empty. Every rank must call this."""
        sums = self._sums
        if sums is None:
            sums = torch.zeros(len(self.names), dtype=_sum_dtype(accelerator.device), device=accelerator.device)
        self._sums = None
        gathered: Tensor = accelerator.reduce(sums, reduction="sum")
        return dict(zip(self.names, gathered.tolist(), strict=True))


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
