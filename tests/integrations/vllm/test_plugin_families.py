"""Models whose decoder layers return something else than Qwen3's: one tensor, or two after norms of their own."""

from __future__ import annotations

import pytest
from integrations.vllm import plugin_cases as cases


@pytest.mark.parametrize("architecture", ["granite", "gemma3_text"])
def test_a_mixed_batch_has_the_tokens_of_transformers(architecture, make_model, tiny_tokenizer, tmp_path, texts):
    model, folder = cases.saved_model(make_model, tmp_path, tiny_tokenizer, architecture)
    llm = cases.engine(folder)
    ids = cases.prompts(tiny_tokenizer, texts)
    tokens, _ = cases.generate(llm, ids)
    plain, _ = cases.generate(llm, ids, [None] * len(ids))
    assert tokens == cases.in_transformers(model, ids)
    same = [row == other for row, other in zip(tokens, plain, strict=True)]
    assert all(equal for equal, edits in zip(same, cases.EDITS, strict=True) if edits is None)
    assert not all(same)
