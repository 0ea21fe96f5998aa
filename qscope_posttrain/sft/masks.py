"""Token positions of a batch that a penalty acts on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from qscope_posttrain.errors import UserValueError

Positions = Literal["response", "predicting"]

IGNORED_LABEL = -100
PADDING_ID = -1  # Language id of padding, and of tokens whose language the user chose to ignore


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Labels and languages of one micro-batch; all tensors `[batch, tokens]`."""

    labels: Tensor  # Unshifted labels; -100 is no response token
    language_ids: Tensor  # Index of each token's language in the known languages, or -1
    starts: Tensor  # bool: first token of a row, and of every document where the batch says where documents start

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any], language_ids: Tensor | None) -> TokenBatch:
        """Read a batch of a trainer's collator: padded, padding-free or packed. Without ids all is one language."""
        labels = inputs.get("labels")
        if labels is None:
            raise UserValueError(
                f"The batch has no 'labels' (its keys: {', '.join(inputs)}), so response tokens are unknown. "
                "Give the trainer a data set that it can make labels from, or a collator that returns them."
            )
        if language_ids is None:
            language_ids = torch.zeros_like(labels)
        if language_ids.shape != labels.shape:
            raise UserValueError(
                f"Language ids {list(language_ids.shape)} and labels {list(labels.shape)} of a batch differ in shape."
            )
        positions = inputs.get("position_ids")
        if positions is not None and positions.ndim != 2:
            raise UserValueError(
                f"Position ids {list(positions.shape)} do not tell where documents start, as [batch, tokens] would. "
                "Models with positions in several dimensions (vision) are not supported with this trainer."
            )
        # A padding-free batch has no attention mask; its position ids restart at 0 with every document.
        begun = torch.zeros_like(labels, dtype=torch.bool) if positions is None else positions == 0
        starts = begun.expand_as(labels).clone()
        starts[:, 0] = True
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:  # padding on the left
            starts |= mask.bool() & (mask.bool().cumsum(1) == 1)
        return cls(labels, language_ids, starts)

    @classmethod
    def from_stacked(cls, stacked: Tensor) -> TokenBatch:
        """Read `stacked()` again."""
        labels, language_ids, starts = stacked.unbind(1)
        return cls(labels, language_ids, starts.bool())

    def stacked(self) -> Tensor:
        """All three as one tensor `[batch, 3, tokens]`, which a trainer may slice or reorder with the batch."""
        return torch.stack([self.labels, self.language_ids, self.starts.to(self.labels)], dim=1)

    def documents(self) -> Tensor:
        """The number of the document that each token is in, counted over the batch; padding goes with its row."""
        return self.starts.flatten().cumsum(0).view_as(self.labels) - 1

    def labeled(self) -> Tensor:
        """Tokens that carry a label, as the published code takes them: `labels != -100`, unshifted."""
        return self.labels != IGNORED_LABEL

    def published(self, target: int | None) -> Tensor:
        """The published mask, bool: every labeled token of a sample that is not in the target language."""
        of_interest = self.labeled() & (self.language_ids >= 0)
        return of_interest if target is None else of_interest & (self.language_ids != target)

    def eligible(self, target: int | None, positions: Positions) -> Tensor:
        """Positions of response tokens that are not in the target language (bool); without a target, of all.

        "response": the position of the response token itself, as published. The last prompt token, which predicts
        the first response token, is not penalized; the end-of-turn token is.
        "predicting": the position before it, whose logits predict it.

        First tokens of a document are never eligible as response tokens: nothing predicts them, and their residuals
        are attention sinks.
        """
        of_interest = self.published(target) & ~self.starts
        if positions == "response":
            return of_interest
        # Position t takes the flag of t + 1; a document's first token has none, so nothing crosses a boundary.
        same_language = self.language_ids[:, 1:] == self.language_ids[:, :-1]
        return pad(of_interest[:, 1:] & same_language, (0, 1), value=False)

    def next_labels(self) -> Tensor:
        """The label that each position predicts: `labels` shifted left, -100 at the end of a row."""
        return pad(self.labels[:, 1:], (0, 1), value=IGNORED_LABEL)
