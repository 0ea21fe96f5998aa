"""The KV cache that a dry run of `qscope grpo` foretells is what an engine then reports.

Not so the weights: on a CPU vLLM packs those of linear layers, and they are no parameters any more.
"""

from __future__ import annotations

import math

import pytest
import torch

from qscope_posttrain.rl.rollouts.vllm_memory import vllm_memory

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm`")

LENGTH, BATCHED, SPACE = 400, 128, 1 << 28
SHAPES = {
    "qwen3": {"num_key_value_heads": 1},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64},
}


@pytest.mark.parametrize("architecture", SHAPES)
def test_an_engine_has_the_blocks_and_rows_that_were_foretold(make_model, tmp_path, monkeypatch, architecture):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    model = make_model(architecture, head_dim=32, **SHAPES[architecture])
    model.save_pretrained(tmp_path)
    engine = vllm.LLM(
        model=str(tmp_path), dtype="float32", max_model_len=LENGTH, max_num_batched_tokens=BATCHED, enforce_eager=True,
        kv_cache_memory_bytes=SPACE, skip_tokenizer_init=True,
    )  # fmt: skip
    try:
        block = engine.llm_engine.vllm_config.cache_config.block_size
        found = vllm_memory(model, LENGTH, dtype=torch.float32, block=block, batched_tokens=BATCHED)
        cache = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        # Layers of two kinds share their blocks: one block holds a token of half of them.
        kinds = len(cache.kv_cache_groups)
        assert kinds == (2 if architecture == "gemma3_text" else 1)
        assert cache.num_blocks == SPACE // (found.per_token // kinds * block)
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        rows = get_max_concurrency_for_kv_cache_config(engine.llm_engine.vllm_config, cache)
        assert found.rows(SPACE + found.weights) == math.floor(rows)
    finally:
        engine.llm_engine.engine_core.shutdown()
