"""The term that a callback adds to the loss of one trainer, and everything that it keeps for this trainer."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.capture import LayerCapture
from qscope_posttrain.models.layers import decoder_layers, final_norm, trained_for
from qscope_posttrain.models.scoring import find_target_tokens, fingerprint
from qscope_posttrain.sft.logits import Anchor, LogitHead, check_head, divergence_from, sharding_of
from qscope_posttrain.sft.loss import Normalizer
from qscope_posttrain.sft.masks import TokenBatch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qscope_posttrain.sft.attachment import AuxiliaryLossCallback

FINAL_NORM = "final_norm"


@dataclass(frozen=True, eq=False)
class Step:
    """One micro-batch after the model's forward; hidden states are `[batch, tokens, d_model]`, with their graph."""

    batch: TokenBatch
    eligible: Tensor  # Positions that the term acts on, bool `[batch, tokens]`
    layers: Mapping[int, Tensor]  # Outputs of the captured decoder layers
    named: Mapping[str, Tensor]  # `FINAL_NORM`, where the loss needs logits: what the model's `head` reads
    normalizer: Normalizer
    inputs: Mapping[str, Any]  # The batch as the collator made it, without the languages


class AuxiliaryLoss(ABC):
    """`weight * term`, and with `anchor_weight` the KL anchor beside it, for one trainer.

    Whatever belongs to a trainer (model, hooks, tokens, starting model) lives here, so that a callback serves several.
    """

    needs_tokens = False
    """Whether the tokens of the target language must be known; otherwise they are only left out of the anchor"""
    needs_anchor = False  # Whether the term itself is a divergence from the starting model

    def __init__(self, trainer: Trainer, callback: AuxiliaryLossCallback, layers: Iterable[int] = ()) -> None:
        """Read and check the trainer's model; nothing is changed. `layers` are captured, by default the last."""
        model: Any = trainer.model
        self.config = config = callback.config
        self.callback_name = type(callback).__name__
        self.model: nn.Module = model
        self.target_id = None if config.target is None else callback.languages.index(config.target)
        self.tokens: Tensor | None = None
        self.anchor: Anchor | None = None
        self.logits_given = callback.logits_given
        if config.needs_logits:
            if not self.logits_given:
                if scheme := sharding_of(trainer):
                    raise UserValueError(
                        "The token penalty and the anchor need the whole output embedding, which no rank holds under "
                        f"{scheme} outside of the model's forward. Use DDP or ZeRO-1/2, or SASFT with anchor_weight=0."
                    )
                check_head(model)
            given = callback.target_token_ids
            if config.target is not None or given is not None:
                self.tokens = find_target_tokens(trainer, config.target or "the anchor", given, self.needs_tokens)
        if self.needs_anchor or config.anchor > 0:
            self.anchor = Anchor.for_trainer(trainer, callback.anchor_model)
        self.penalized = tuple(layers)
        chosen = self.penalized or (len(decoder_layers(model)) - 1,)
        norm = {FINAL_NORM: final_norm(model)} if config.needs_logits and not self.logits_given else None
        self.capture = LayerCapture(model, chosen, norm)
        self.capture.active = False

    # What a subclass gives

    @abstractmethod
    def penalty(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The normalized term without its weight, and sums over this micro-batch by name: scalars and vectors."""

    @abstractmethod
    def rates(self, totals: Mapping[str, list[float]]) -> dict[str, float]:
        """Values to log beside the terms, from those sums over a logging window and over all ranks."""

    def eligible(self, batch: TokenBatch) -> Tensor:
        """Positions that the term acts on, bool `[batch, tokens]`; "paper" normalization counts them."""
        return batch.eligible(self.target_id, "predicting")

    # Common to all

    def begin(self) -> None:
        """A training begins. ValueError for a penalized layer that no trained parameter changes, where the penalty has
        no gradient.

        The graph does not tell: with checkpointing or `enable_input_require_grads` every layer's output has one.
        """
        unchanged = [layer for layer in self.penalized if not trained_for(self.model, layer)]
        if unchanged and self.config.weight > 0:
            raise UserValueError(
                f"{self.callback_name} would change nothing on layer(s) {', '.join(map(str, unchanged))}: every "
                "parameter there and below is frozen, so that the penalty has no gradient. Train parameters at or below"
                " the layers that it reads (with PEFT: layers_to_transform), or penalize later layers (layers=...)."
            )

    def added_to(self, loss: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss` with the term, and what the window sums up. A term that only measures leaves it as it is, bit by bit.

        Raises:
            ValueError: the term does not act on what is trained, or only on a part of it.
        """
        term, sums = self.value(step)
        if self.config.weight == 0 and self.config.anchor == 0:
            return loss, sums
        captured = [*step.layers.values(), *step.named.values()]
        several = max(self.capture.calls.values()) > 1 and not all(hidden.requires_grad for hidden in captured)
        # Where the head alone is trained, a micro-batch without a penalized token has no graph.
        if loss.requires_grad and (several or (not term.requires_grad and bool(term != 0))):
            raise UserValueError(
                f"{self.callback_name} would change nothing, or not all that is trained: what it reads of the model's "
                "first forward in compute_loss has no gradient. Train parameters at or below the layers that it reads, "
                "and run the forward of the loss before any without gradient."
            )
        return loss + term.to(loss), sums

    def value(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to add to the loss, weights included, and what the window sums up."""
        weight, anchor_weight = self.config.weight, self.config.anchor
        # A term that only measures must not even contribute a zero gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            penalty, sums = self.penalty(step)
        term = weight * penalty if weight else torch.zeros_like(penalty)
        sums["penalty"] = penalty.detach() * step.normalizer.logged
        if anchor_weight > 0:
            anchor = step.normalizer(self.divergence(step, step.batch.eligible(self.target_id, "predicting")).sum())
            term = term + anchor_weight * anchor.to(term.device)
            sums["anchor"] = anchor.detach() * step.normalizer.logged
        return term, sums

    @property
    def head(self) -> LogitHead:
        """The map from a step's `FINAL_NORM` to logits."""
        return LogitHead(None) if self.logits_given else LogitHead.of(self.model)

    def divergence(self, step: Step, positions: Tensor) -> Tensor:
        """`KL(start || model)` at `positions`, over all tokens but the target's if these are known; `[positions]`."""
        if self.anchor is None:
            raise RuntimeError("The divergence needs a starting model, which this loss was made without.")
        start, start_head = self.anchor.start(self.model, step.inputs)
        hidden = step.named[FINAL_NORM]
        # The layers of a model that is split over devices end on another one than that of the labels.
        start, hidden = start[positions.to(start.device)], hidden[positions.to(hidden.device)]
        return divergence_from(start_head, start, self.head, hidden, self.tokens)

    def metrics(self, totals: Mapping[str, list[float]], steps: int, ranks: int) -> dict[str, float]:
        """Values to log, from sums over a logging window of `steps` optimizer steps and over `ranks` processes."""
        terms = {name: totals[name][0] / (ranks * steps) for name in ("penalty", "anchor") if name in totals}
        return terms | self.rates(totals)

    def identity(self) -> dict[str, Any]:
        """Values that a resumed run must find again, beside the callback's settings."""
        found = {"target_tokens_sha256": None if self.tokens is None else fingerprint(self.tokens)}
        return found if self.anchor is None else {**found, "start_sha256": self.anchor.fingerprint(self.model)}

    def captured(self, labels: Tensor) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """The captured tensors, by layer and by name, at the positions of `labels` `[batch, tokens]`.

        Virtual tokens, which PEFT puts before every row inside the model (prompt tuning, p-tuning), are left out.
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
    """Running sums of named tensors, without a synchronization with the host until `totals()`.

    Every rank adds the same names in every micro-batch, also one without a token of interest.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._sums: Tensor | None = None

    def add(self, values: Mapping[str, Tensor], device: torch.device) -> None:
        """Add one micro-batch."""
        self._sizes = {name: value.numel() for name, value in values.items()}
        flat = torch.cat([value.detach().to(device).reshape(-1).float() for value in values.values()])
        # Token counts of a long window pass 2**24, where fp32 stops counting.
        flat = flat.to(torch.float32 if device.type == "mps" else torch.float64)
        self._sums = flat if self._sums is None else self._sums + flat

    def totals(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """Sums over the window and over all ranks, by name; then empty. Every rank must call this."""
        numbers = iter(accelerator.reduce(self._sums, reduction="sum").tolist())
        self._sums = None
        return {name: list(itertools.islice(numbers, size)) for name, size in self._sizes.items()}
