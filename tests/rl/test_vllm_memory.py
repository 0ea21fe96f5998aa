"""Memory of vLLM's rollouts, against arithmetic on published models; tests/integrations/vllm asks a real engine."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig, Qwen3Config, Qwen3MoeConfig

from qscope_posttrain.rl.rollouts.vllm_memory import vllm_dtype, vllm_memory

GIB = 1 << 30
QWEN3_8B = Qwen3Config(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip
QWEN3_30B_A3B = Qwen3MoeConfig(
    vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=4, head_dim=128, num_experts=128, tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip


def meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.promise("The memory that vLLM needs is foretold for published models")
def test_published_models():
    """8.19 and 30.5 billion parameters; 8 and 4 heads of keys and values of width 128 on 36 and 48 layers."""
    dense = vllm_memory(meta(QWEN3_8B), 4096)
    assert dense.weights == 2 * 8_190_735_360
    assert dense.per_token == 2 * 36 * 8 * 128 * 2 == 144 * 1024
    assert dense.per_row == 4096 * dense.per_token
    experts = vllm_memory(meta(QWEN3_30B_A3B), 4096)
    assert experts.weights == pytest.approx(2 * 30.53e9, rel=1e-3)
    assert experts.per_token == 96 * 1024


def test_gpus_share_matrices_and_heads_but_a_head_is_whole():
    alone, two, eight = (vllm_memory(meta(QWEN3_30B_A3B), 4096, size) for size in (1, 2, 8))
    assert two.weights == pytest.approx(alone.weights / 2, rel=1e-3)
    assert two.weights > alone.weights / 2  # norms are on both
    assert (two.per_token, eight.per_token) == (alone.per_token // 2, alone.per_token // 4)


def test_rows_take_whole_blocks_and_what_the_weights_leave():
    memory = vllm_memory(meta(QWEN3_8B), 4097)
    assert memory.per_row == (4096 + 16) * memory.per_token
    assert memory.rows(memory.weights + 3.5 * memory.per_row) == 3
    assert memory.rows(memory.weights - GIB) == 0


def test_tied_embeddings_count_once_and_half_precision_is_the_stored_one():
    small = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    tied, untied = (meta(Qwen3Config(**small, tie_word_embeddings=tied)) for tied in (True, False))
    assert vllm_memory(untied, 16).weights - vllm_memory(tied, 16).weights == 2 * 512 * 64
    assert vllm_memory(tied, 16, dtype=torch.float32).weights == 2 * vllm_memory(tied, 16).weights
    stored = [vllm_dtype(meta(Qwen3Config(**small, dtype=name))) for name in (None, "float32", "float16")]
    assert stored == [torch.bfloat16, torch.bfloat16, torch.float16]


def test_a_sliding_window_keeps_its_tokens_and_those_of_a_step():
    mistral = MistralConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
                            num_attention_heads=4, num_key_value_heads=2, sliding_window=1024)  # fmt: skip
    page = 2 * 2 * 16 * 2  # keys and values, heads, width, bytes
    short, long = (vllm_memory(meta(mistral), length, batched_tokens=100) for length in (512, 100_000))
    assert short.per_row == 3 * (512 + 16) * page
    assert long.per_row == 3 * (1136 + 16) * page  # 1023 + 100 in blocks of 16, and one more
    assert long.per_token == short.per_token == 3 * page
    gemma = Gemma3TextConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=6,
                             num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=32)  # fmt: skip
    assert gemma.layer_types.count("sliding_attention") == 5
    assert vllm_memory(meta(gemma), 4096, batched_tokens=17).per_row == page * (4096 + 5 * (48 + 16))


def test_other_memories_are_refused_rather_than_guessed(make_model):
    with pytest.raises(ValueError, match="linear_attention is not known"):
        vllm_memory(make_model("qwen3_5_text"), 64)
