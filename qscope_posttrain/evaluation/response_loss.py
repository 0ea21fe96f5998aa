"""How probable text is to a model, token by token: responses after their prompts, and plain texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.batches import (
    TokenBatch,
    TokenSequence,
    longest_allowed,
    pad_token,
    token_batches,
    tokenize_texts,
)
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.models.scoring import LOGITS_AT_A_TIME, model_logits


def response_losses(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int = 8192,
) -> tuple[Tensor, Tensor]:
    """-log P(response | prompt), summed over the response's tokens, by one forward over each pair of token ids.

    Returns:
        (loss [responses] fp64, tokens [responses] int64), on the CPU; 0 and 0 for an empty response.

    Raises:
        ValueError: an empty prompt, after which nothing predicts the first token, or different numbers of both.
    """
    if len(prompts) != len(responses):
        raise UserValueError(f"{len(prompts)} prompts but {len(responses)} responses.")
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserValueError("An empty prompt: nothing predicts the first token of its response.")
    sequences = [
        TokenSequence(0, number, (*prompt, *response), False, len(prompt))
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        if len(response) > 0
    ]
    return _losses(model, sequences, len(responses), tokens_per_batch, 0)


def text_losses(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, max_length: int = 512, tokens_per_batch: int = 8192
) -> tuple[Tensor, Tensor]:
    """As `response_losses` for plain texts: every token but the first is predicted."""
    sequences = tokenize_texts(tokenizer, {"texts": texts}, longest_allowed(model, max_length))
    return _losses(model, sequences, len(texts), tokens_per_batch, pad_token(tokenizer))


@torch.no_grad()
def _losses(
    model: nn.Module, sequences: Sequence[TokenSequence], count: int, tokens_per_batch: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    losses, tokens = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
    with evaluation_mode(model):
        for batch in token_batches(sequences, tokens_per_batch, pad_id):
            numbers = torch.tensor([sequence.text for sequence in batch.sequences])
            losses[numbers] = _batch_losses(model, batch)
            tokens[numbers] = torch.tensor([sequence.counted for sequence in batch.sequences])
    return losses, tokens


def _batch_losses(model: nn.Module, batch: TokenBatch) -> Tensor:
    """[batch] fp64, on the CPU."""
    flat = model_logits(model, batch)
    counted = batch.positions()
    owners = torch.div(counted, batch.input_ids.shape[1], rounding_mode="floor").to(flat.device)
    tokens = batch.input_ids.flatten()[counted].to(flat.device)
    predicting = (counted - 1).to(flat.device)
    sums = torch.zeros(len(batch.sequences), dtype=torch.float64, device=flat.device)
    size = max(1, LOGITS_AT_A_TIME // flat.shape[1])
    for at, token, owner in zip(predicting.split(size), tokens.split(size), owners.split(size), strict=True):
        loss = torch.nn.functional.cross_entropy(flat.index_select(0, at).float(), token, reduction="none")
        sums.index_add_(0, owner, loss.double())
    return sums.cpu()
