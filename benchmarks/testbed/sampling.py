"""Fast sampling of many short completions from token prompts, reproducible on its own generator.

`generate` of transformers, behind `models.generation`, costs the models of the testbed several times as much per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.generation import Response
from qscope_posttrain.report.progress import progress

_LEAVE_AT = 0.1
"""Finished rows leave the batch when they are this share of it: each time costs a copy of the cache."""


def sample_completions(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 512,
    end: int | None = None,
    description: str | None = None,
) -> list[Response]:
    """Draw one completion of every prompt from the whole distribution (no top-k, no top-p).

    Prompts of equal length are sampled together, so nothing is padded. The same arguments give the same draws.

    Args:
        max_new_tokens: longest completion, the end token not counted in `Response.tokens`.
        temperature: divides the logits; 0 takes the likeliest token.
        end: token that ends a completion; None: every completion has `max_new_tokens` tokens.
        description: of a progress line; None shows none.

    Raises:
        ValueError: a negative temperature, no or an empty prompt, or a length or batch below 1.
    """
    if temperature < 0 or min(max_new_tokens, batch_size) < 1 or not prompts or not all(map(len, prompts)):
        raise UserValueError(
            f"sampling needs a temperature of at least 0 (got {temperature}), at least one new token (got "
            f"{max_new_tokens}), a batch of at least one (got {batch_size}), a prompt, and no empty prompt"
        )
    generator = torch.Generator(device=model.device).manual_seed(seed)
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    batches = [
        indices[begin : begin + batch_size]
        for _, indices in sorted(by_length.items())
        for begin in range(0, len(indices), batch_size)
    ]
    completions: dict[int, Response] = {}
    was_training = model.training
    model.eval()
    try:
        for indices in progress(batches, description=description or "", enabled=None if description else False):
            tokens = torch.tensor([list(prompts[index]) for index in indices], device=model.device)
            for index, row in zip(
                indices, _sample_batch(model, tokens, max_new_tokens, end, temperature, generator).tolist(), strict=True
            ):
                length = row.index(end) if end in row else len(row)
                completions[index] = Response(row[:length], length < len(row))
    finally:
        model.train(was_training)
    return [completions[index] for index in range(len(prompts))]


@torch.no_grad()
def _sample_batch(
    model: PreTrainedModel,
    tokens: Tensor,
    max_new_tokens: int,
    end: int | None,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Completions [rows, max_new_tokens], `end` from the end on."""
    rows = len(tokens)
    drawn = torch.full((rows, max_new_tokens), -1 if end is None else end, device=tokens.device)
    place = torch.arange(rows, device=tokens.device)
    finished = torch.zeros(rows, dtype=torch.bool, device=tokens.device)
    cache = DynamicCache(config=model.config)
    for step in range(max_new_tokens):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        if temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        if end is not None:
            tokens = tokens.masked_fill(finished.unsqueeze(1), end)
            finished = finished | (tokens.squeeze(1) == end)
        drawn[place, step] = tokens.squeeze(1)
        done = int(finished.sum())
        if done == len(finished):
            break
        if done >= _LEAVE_AT * len(finished):
            left = (~finished).nonzero().squeeze(1)
            cache.batch_select_indices(left)
            place, tokens, finished = place[left], tokens[left], finished[left]
    return drawn
