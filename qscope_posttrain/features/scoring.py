"""How probable the tokens of a language are at the positions of real text in other languages: forwards only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.features.batches import TokenBatch, input_device
from qscope_posttrain.features.contrast import ContrastSample, contrast_sample
from qscope_posttrain.residual.evaluation_mode import evaluation_mode

LOGITS_AT_A_TIME = 1 << 24
"""Logits converted to fp32 at a time: 64 MiB."""


@dataclass(frozen=True, eq=False)
class TextScores:
    """Sums over the predicting positions of each text (every position that has a next token); fp64, on the CPU."""

    probability: Tensor
    """[texts] sum of P(target tokens)"""
    loss: Tensor
    """[texts] sum of -log P(next token)"""
    tokens: Tensor
    """[texts] predicting positions"""

    @property
    def mean_probability(self) -> float:
        """Mean over positions of P(target tokens): the hazard of a switch at a token."""
        return float(self.probability.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return float((self.loss.sum() / self.tokens.sum()).exp())


def target_probability(
    model: nn.Module, tokenizer: Any, texts: Mapping[str, Sequence[str]], target: str, **options: Any
) -> TextScores:
    """Teacher-forced P(target tokens) = sum of the probabilities of a set of tokens, on text of the OTHER languages.

    `options` are those of `contrast.contrast_sample`, which chooses texts and tokens.
    """
    sample = contrast_sample(model, tokenizer, texts, target, **options)
    with evaluation_mode(model):
        return score_sample(model, sample)


@torch.no_grad()
def score_sample(model: nn.Module, sample: ContrastSample) -> TextScores:
    """Scores of all texts of the sample, in the order of its batches. One ordinary forward a batch."""
    probability, loss, counts = [], [], []
    for batch in sample.batches:
        flat = model_logits(model, batch)
        positions, owners = predicting_positions(batch)
        labels = batch.input_ids.roll(-1, dims=1).flatten()
        chunk = max(1, LOGITS_AT_A_TIME // flat.shape[1])
        sums = torch.zeros(2, len(batch.sequences), dtype=torch.float64, device=flat.device)
        positions, owners, next_tokens = (t.to(flat.device) for t in (positions, owners, labels[positions]))
        for at, owner, token in zip(positions.split(chunk), owners.split(chunk), next_tokens.split(chunk), strict=True):
            log_all, log_target = log_masses(flat.index_select(0, at), sample.target_tokens)
            log_next = flat[at, token].float() - log_all
            sums[0].index_add_(0, owner, (log_target - log_all).exp().double())
            sums[1].index_add_(0, owner, -log_next.double())
        probability.append(sums[0].cpu())
        loss.append(sums[1].cpu())
        counts.append((batch.lengths - 1).double())
    return TextScores(torch.cat(probability), torch.cat(loss), torch.cat(counts))


def model_logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    """[batch * length, vocabulary], as the model itself makes them (soft caps and scales included)."""
    logits: Tensor = model(input_ids=batch.input_ids.to(input_device(model)), use_cache=False).logits
    return logits.flatten(0, 1)


def predicting_positions(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Flattened positions that have a next token [tokens], and the sequence each belongs to [tokens]."""
    column = torch.arange(batch.input_ids.shape[1])
    row, at = (column < batch.lengths[:, None] - 1).nonzero(as_tuple=True)
    return row * batch.input_ids.shape[1] + at, row


def log_masses(logits: Tensor, target_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(log sum exp over the vocabulary, log sum exp over the target tokens) of `logits` [tokens, vocabulary], fp32."""
    logits = logits.float()
    chosen = logits.index_select(1, target_tokens.to(logits.device))
    return logits.logsumexp(dim=1), chosen.logsumexp(dim=1)
