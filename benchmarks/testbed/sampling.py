"""The engine that samples from the testbed's models (see `models.generation.SamplingEngine`): a quarter of the time.

`generate` of transformers keeps a row in the batch until the last one has ended, and prepares inputs at every token.
For 2048 answers of the repetition model it takes 17 to 18 s on a core, this 4.7 s; the demo draws many times as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.generation import Response, SamplingSettings
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.report.progress import progress

BATCH = 512  # Rows that a model of the testbed samples at a time
_LEAVE_AT = 0.1
"""Finished rows leave the batch when they are this share of it: each time costs a copy of the cache."""


@dataclass(frozen=True)
class SmallModelSampler:
    """Samples from the whole distribution of a model (no top-p), prompts of equal length together, so that nothing is
    padded. The same settings give the same draws, from a generator of their own."""

    model: PreTrainedModel
    end: int | None = None  # Token that ends a response; None: each has `max_new_tokens` tokens

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.model.config

    def stated(self) -> dict[str, Any]:
        """Settings to report with the results."""
        return {"engine": "testbed"}

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        tokenizer: Any = None,
        show_progress: bool | None = False,
    ) -> list[Response]:
        """One response to each encoded prompt; the tokenizer is not read. ValueError for no or an empty prompt, or a
        `top_p` below 1."""
        if not prompts or not all(map(len, prompts)) or settings.top_p < 1:
            raise UserValueError(f"sampling needs a prompt, no empty one, and top_p=1; got top_p={settings.top_p}")
        model, size = self.model, settings.batch_size
        generator = torch.Generator(device=model.device).manual_seed(settings.seed)
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(index)
        batches = [
            indices[begin : begin + size]
            for _, indices in sorted(by_length.items())
            for begin in range(0, len(indices), size)
        ]
        found: dict[int, Response] = {}
        with evaluation_mode(model):
            for indices in progress(batches, description="sampling responses", enabled=show_progress):
                tokens = torch.tensor([list(prompts[index]) for index in indices], device=model.device)
                drawn = _sample_batch(model, tokens, settings.max_new_tokens, self.end, settings.temperature, generator)
                for index, row in zip(indices, drawn.tolist(), strict=True):
                    length = row.index(self.end) if self.end in row else len(row)
                    found[index] = Response(row[:length], length < len(row))
        return [found[index] for index in range(len(prompts))]


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
