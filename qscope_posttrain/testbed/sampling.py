"""Sampling from token prompts of equal length: a window is cut anywhere, so its prompt has no exact text form."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qscope_posttrain.errors import UserValueError

_BATCH = 128


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel, prompts: Tensor, tokens: int, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """Sample exactly `tokens` tokens after each prompt, from the whole distribution (no top-k, no top-p).

    Args:
        model: a causal language model with a key-value cache.
        prompts: [prompts, length] int64.
        tokens: length of every response.
        temperature: divides the logits.
        seed: the same seed gives the same draws.

    Returns:
        [prompts, tokens] int64, on the prompts' device.

    Raises:
        ValueError: a temperature that is not positive, or no prompt.
    """
    if not temperature > 0:
        raise UserValueError(f"sampling needs a temperature above 0, got {temperature}")
    if prompts.dim() != 2 or not len(prompts):
        raise UserValueError(f"prompts must be [prompts, length] with at least one row, got {list(prompts.shape)}")
    was_training = model.training
    model.eval()
    generator = torch.Generator(device=model.device).manual_seed(seed)
    responses = []
    for batch in prompts.split(_BATCH):
        output = model(input_ids=batch.to(model.device), use_cache=True, logits_to_keep=1)
        drawn: list[Tensor] = []
        while True:
            distribution = (output.logits[:, -1].float() / temperature).softmax(-1)
            drawn.append(torch.multinomial(distribution, 1, generator=generator))
            if len(drawn) == tokens:
                break
            output = model(input_ids=drawn[-1], past_key_values=output.past_key_values, use_cache=True)
        responses.append(torch.cat(drawn, dim=1).to(prompts.device))
    model.train(was_training)
    return torch.cat(responses)
