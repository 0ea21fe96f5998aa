"""Fast sampling of many short completions: one key-value cache a batch, which finished rows leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import progress

_BATCH = 512
_LEAVE_AT = 0.1
"""Finished rows leave when they are this share of the batch: each time costs a copy of the cache."""


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt."""

    tokens: tuple[int, ...]
    """Up to, not including, the end token."""
    ended: bool
    """Whether the end token followed; else the length limit cut it."""


def sample_completions(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = _BATCH,
    finished_leave: bool = True,
    description: str | None = None,
) -> list[Completion]:
    """One completion of every prompt, drawn from the whole distribution (no top-k, no top-p).

    Prompts of equal length are sampled together, so that nothing is padded. The same arguments give the same draws.

    Args:
        model: a causal language model with a key-value cache and an `eos_token_id`; its mode is restored.
        prompts: token ids, at least one each.
        max_new_tokens: longest completion, the end token not counted in `Completion.tokens`.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: of a generator of its own.
        batch_size: rows sampled at a time.
        finished_leave: False keeps finished rows in the batch, as steering with one window or direction a row needs.
        description: of a progress line; None shows none.

    Returns:
        One completion a prompt, in their order.

    Raises:
        ValueError: a negative temperature, an empty prompt, a length or batch below 1, or a model without an end token.
    """
    end = model.config.eos_token_id
    if not isinstance(end, int):
        raise UserValueError(f"sampling needs a model with one end token, got eos_token_id={end!r}")
    if temperature < 0 or max_new_tokens < 1 or batch_size < 1 or not all(len(prompt) for prompt in prompts):
        raise UserValueError(
            f"sampling needs a temperature from 0 (got {temperature}), at least one new token (got {max_new_tokens}), "
            f"a batch of at least one (got {batch_size}) and no empty prompt"
        )
    generator = torch.Generator(device=model.device).manual_seed(seed)
    batches = list(_batches(prompts, batch_size))
    completions: dict[int, Completion] = {}
    was_training = model.training
    model.eval()
    try:
        shown = progress(batches, description=description or "sampling", enabled=None if description else False)
        for indices in shown:
            batch = torch.tensor([list(prompts[index]) for index in indices], device=model.device)
            drawn = _sample_batch(model, batch, max_new_tokens, end, temperature, generator, finished_leave)
            completions.update(zip(indices, _completions(drawn, end), strict=True))
    finally:
        model.train(was_training)
    return [completions[index] for index in range(len(prompts))]


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of prompts of one length, at most `size` at a time, in their order within a length."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for length in sorted(by_length):
        indices = by_length[length]
        for begin in range(0, len(indices), size):
            yield indices[begin : begin + size]


@torch.no_grad()
def _sample_batch(
    model: PreTrainedModel,
    prompts: Tensor,
    max_new_tokens: int,
    end: int,
    temperature: float,
    generator: torch.Generator,
    finished_leave: bool,
) -> Tensor:
    """Completions [rows, max_new_tokens], `end` from the end on."""
    rows = len(prompts)
    drawn = torch.full((rows, max_new_tokens), end, device=prompts.device)
    place = torch.arange(rows, device=prompts.device)
    finished = torch.zeros(rows, dtype=torch.bool, device=prompts.device)
    cache = DynamicCache(config=model.config)
    tokens = prompts
    for step in range(max_new_tokens):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        if temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = tokens.masked_fill(finished.unsqueeze(1), end)
        drawn[place, step] = tokens.squeeze(1)
        finished = finished | (tokens.squeeze(1) == end)
        done = int(finished.sum())
        if done == len(finished):
            break
        if finished_leave and done >= _LEAVE_AT * len(finished):
            left = (~finished).nonzero().squeeze(1)
            cache.batch_select_indices(left)
            place, tokens, finished = place[left], tokens[left], finished[left]
    return drawn


def _completions(drawn: Tensor, end: int) -> list[Completion]:
    rows = drawn.tolist()
    lengths = (drawn != end).long().cumprod(1).sum(1).tolist()
    return [Completion(tuple(row[:length]), length < len(row)) for row, length in zip(rows, lengths, strict=True)]
