"""How probable the tokens of a language are at the positions of real text in other languages: forwards only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.batches import (
    TokenBatch,
    check_texts,
    input_device,
    longest_allowed,
    pad_token,
    token_batches,
    tokenize_texts,
)
from qscope_posttrain.models.layers import evaluation_mode, text_config
from qscope_posttrain.text.scripts import language_code, scripts_of_name, target_script
from qscope_posttrain.text.tokens import script_token_ids

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


@dataclass(frozen=True, eq=False)
class ContrastSample:
    """A fixed sample of text in languages other than the target, and the token ids that count as the target's."""

    languages: tuple[str, ...]
    batches: list[TokenBatch]
    target_tokens: Tensor
    """[tokens] int64, ascending"""


def contrast_sample(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    target: str,
    *,
    target_tokens: Tensor | None = None,
    texts_per_language: int | None = 100,
    tokens_per_batch: int = 2048,
    max_length: int = 512,
) -> ContrastSample:
    """Choose the text and the tokens for `target`.

    Args:
        texts: {language: texts}; those of `target` are not read.
        target_tokens: ids that count as the target's tokens. By default the tokens that write the target's script,
            and then languages that write it too are not read either: Japanese text rightly holds Han.
        texts_per_language: a sample of so many texts a language, those with the smallest content hashes, whatever
            their order; None for all.
        tokens_per_batch: tokens in a forward pass, padding included.
        max_length: texts are cut after so many tokens (at most the model's max_position_embeddings).

    Raises:
        ValueError: no text in another language, no unique script and no target_tokens, or ids that do not exist.
    """
    script = target_script(language_code(target)) if target_tokens is None else None
    languages = [
        language
        for language in check_texts(texts)
        if language != target and (script is None or script not in scripts_of_name(language))
    ]
    if not languages:
        unless = f", one that does not write {script}" if script else ""
        raise UserValueError(f"Text in a language other than {target!r} is needed{unless}; got {', '.join(texts)}.")
    others = {language: _sample(texts[language], texts_per_language) for language in languages}
    sequences = tokenize_texts(tokenizer, others, longest_allowed(model, max_length))
    usable = [sequence for sequence in sequences if len(sequence.ids) > 1]
    return ContrastSample(
        languages=tuple(languages),
        batches=token_batches(usable, tokens_per_batch, pad_token(tokenizer)),
        target_tokens=_checked_tokens(model, tokenizer, script, target_tokens),
    )


def _sample(lines: Sequence[str], count: int | None) -> list[str]:
    if count is not None and count < 1:
        raise UserValueError(f"texts_per_language must be at least 1, got {count}.")
    if count is None or len(lines) <= count:
        return list(lines)
    return sorted(lines, key=lambda line: hashlib.sha256(line.encode(errors="surrogatepass")).digest())[:count]


def _checked_tokens(model: nn.Module, tokenizer: Any, script: str | None, given: Tensor | None) -> Tensor:
    if script is not None:
        ids = script_token_ids(tokenizer, script)
        if len(ids) == 0:
            raise UserValueError(f"No token of this tokenizer writes {script}: give target_tokens.")
    else:
        ids = torch.as_tensor(given).long().flatten().unique()
    vocabulary = int(text_config(model).vocab_size)
    if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        found = f"ids from {int(ids.min())} to {int(ids.max())}" if len(ids) else "none"
        raise UserValueError(
            f"Target tokens must be ids from 0 to {vocabulary - 1} of the model's vocabulary, got {found}."
        )
    return ids
