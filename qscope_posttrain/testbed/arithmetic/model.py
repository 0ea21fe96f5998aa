"""The language model of the arithmetic testbed: Qwen3's architecture, some 150,000 parameters."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig

_POSITIONS = 512


def build_model(tokenizer: PreTrainedTokenizerBase, config: ArithmeticConfig) -> Qwen3ForCausalLM:
    """A randomly initialised model, the same for the same `config.model_seed`."""
    architecture = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.model_layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.hidden_size // config.heads,
        max_position_embeddings=_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.model_seed)
        return Qwen3ForCausalLM(architecture)
