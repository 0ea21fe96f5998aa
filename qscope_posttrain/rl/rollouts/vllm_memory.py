"""Memory that vLLM needs for rollouts, from a model's configuration: weights and KV cache, without a GPU or vLLM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.layers import text_config

BATCHED_TOKENS = 4096
"""Tokens of one step of the engine, as TRL sets them (`max_num_batched_tokens`)"""
BLOCK = 16
"""Tokens of a block of the KV cache on a GPU; a row takes whole blocks"""
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class VLLMMemory:
    """Bytes on each of the GPUs that share the model."""

    weights: int
    """About: matrices are shared out, vectors are on every GPU, and what vLLM pads is not counted"""
    per_token: int
    """KV cache of a token of which every layer keeps all; a layer with a sliding window forgets it later"""
    per_row: int
    """KV cache of a row of the full length, in whole blocks"""

    def rows(self, memory: float) -> int:
        """How many rows of the full length fit into `memory` beside the weights. Activations are not counted."""
        return max(0, math.floor((memory - self.weights) / self.per_row))


def vllm_memory(
    model: nn.Module,
    length: int,
    tensor_parallel_size: int = 1,
    dtype: torch.dtype | None = None,
    block: int = BLOCK,
    batched_tokens: int = BATCHED_TOKENS,
) -> VLLMMemory:
    """Memory that vLLM would take for a model of transformers and rows of `length` tokens, prompt and completion.

    Args:
        model: The model, on the meta device, perhaps: only its configuration and its shapes are read.
        length: Longest row in tokens.
        tensor_parallel_size: Number of GPUs that share the model. Heads of keys and values are shared out, too, and
            repeated where there are fewer heads than GPUs.
        dtype: Of weights and cache; by default `vllm_dtype(model)`.
        block: Tokens of a block of the KV cache.
        batched_tokens: Tokens of one step, which a layer with a sliding window holds beside its window.

    Raises:
        ValueError: layers whose memory is not known here: latent attention, or a state instead of keys and values.
    """
    size = (dtype or vllm_dtype(model)).itemsize
    config: Any = text_config(model)
    full, windows = _attention(config)
    heads = config.num_key_value_heads if getattr(config, "num_key_value_heads", None) else config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    page = 2 * math.ceil(heads / tensor_parallel_size) * width * size
    blocks = full * math.ceil(length / block)
    for window in windows:
        # The window, the tokens of the step, and a block more because it need not begin where a block does.
        blocks += math.ceil(min(window - 1 + batched_tokens, length) / block) + 1
    shapes = [parameter.shape for parameter in model.parameters()]
    shared = sum(shape.numel() for shape in shapes if len(shape) > 1)
    alone = sum(shape.numel() for shape in shapes) - shared
    return VLLMMemory(
        weights=size * (math.ceil(shared / tensor_parallel_size) + alone),
        per_token=page * (full + len(windows)),
        per_row=page * block * blocks,
    )


def vllm_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that vLLM takes by itself: that of the stored weights, bfloat16 in place of float32."""
    stored = getattr(text_config(model), "dtype", None)
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    return torch.bfloat16 if stored in (None, torch.float32) else stored


def _attention(config: Any) -> tuple[int, list[int]]:
    """The number of layers that keep all keys and values, and the windows of those that do not."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = [_FULL if window is None else _SLIDING] * config.num_hidden_layers
    unknown = sorted(set(kinds) - {_FULL, _SLIDING})
    if getattr(config, "kv_lora_rank", None):
        unknown.append("latent attention")
    if unknown:
        raise UserValueError(
            f"the memory that vLLM takes for layers of {', '.join(unknown)} is not known here; only for layers with "
            "keys and values of all tokens, or of a sliding window."
        )
    return kinds.count(_FULL), [int(window or 0)] * kinds.count(_SLIDING)
