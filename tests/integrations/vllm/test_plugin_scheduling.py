"""Steered rows whose prompts are read in pieces or from the cache, that are preempted, or that run compiled."""

from __future__ import annotations

import pytest
from integrations.vllm import plugin_cases as cases


@pytest.fixture(scope="module")
def model_and_folder(make_model, tiny_tokenizer, tmp_path_factory):
    return cases.saved_model(make_model, tmp_path_factory.mktemp("qwen3"), tiny_tokenizer)


@pytest.fixture(scope="module")
def ids(tiny_tokenizer, texts):
    """Prompts that begin alike, for longer than a block of the cache."""
    common = [token for line in texts["en"] for token in tiny_tokenizer(line)["input_ids"]][:40]
    return [common + row for row in cases.prompts(tiny_tokenizer, texts)]


def test_prompts_in_pieces_and_from_the_cache(model_and_folder, ids):
    model, folder = model_and_folder
    llm = cases.engine(folder, max_num_batched_tokens=16)
    expected = cases.in_transformers(model, ids)
    for _ in range(2):
        assert cases.generate(llm, ids)[0] == expected
        assert llm.collective_rpc("qscope_take_counts") == [cases.expected_counts()]
    assert cases.metric(llm, "prefix_cache_hits") > 0


@pytest.mark.promise("vLLM steers the rows that ask for it and no other")
def test_preempted_rows_are_computed_again_and_steered_again(model_and_folder, ids):
    """The cache holds 7 blocks of 32 tokens, and the 9 rows need 27."""
    model, folder = model_and_folder
    llm = cases.engine(folder, max_model_len=128, num_gpu_blocks_override=8)
    lengths = [48 - place for place in range(len(ids))]
    tokens, _ = cases.generate(llm, ids, lengths=lengths)
    assert cases.metric(llm, "num_preemptions") > 0
    assert tokens == cases.in_transformers(model, ids, lengths=lengths)
    assert llm.collective_rpc("qscope_take_counts") == [cases.expected_counts(lengths=lengths)]


def test_a_compiled_model_is_steered_too(model_and_folder, ids):
    """Through Inductor, which takes most of this folder's time."""
    model, folder = model_and_folder
    llm = cases.engine(folder, enforce_eager=False)
    assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
    tokens, _ = cases.generate(llm, ids)
    assert tokens == cases.in_transformers(model, ids)
    assert llm.collective_rpc("qscope_take_counts") == [cases.expected_counts()]
