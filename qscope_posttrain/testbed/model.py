"""The testbed's language model: Qwen3's architecture, about a million parameters."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from qscope_posttrain.errors import UserValueError

INTERMEDIATE_RATIO = 2.5
"""MLP width over hidden size."""


def build_model(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, num_layers: int, num_heads: int, max_length: int, seed: int
) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 with tied embeddings and half as many key-value heads as heads.

    Raises:
        ValueError: sizes that do not divide.
    """
    if num_heads % 2 or hidden_size % num_heads:
        raise UserValueError(
            f"hidden_size {hidden_size} needs an even number of heads that divides it, got {num_heads}"
        )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=int(INTERMEDIATE_RATIO * hidden_size),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max(max_length, 128),
        tie_word_embeddings=True,
        attention_dropout=0.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
