"""Two steps of DAPO through transformers and through a colocated vLLM: the same tokens, the same gradients."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not installed here: make test-vllm")

from integrations.vllm.rollout_cases import GREEDY, KINDS, small_engines, train
from sft.cases import relative_error


@pytest.fixture(scope="module")
def runs(model):
    """Greedy runs of each kind, through both engines."""
    with small_engines():
        return {
            kind: (train(model, **GREEDY, **options), train(model, use_vllm=True, **GREEDY, **options))
            for kind, options in KINDS.items()
        }


@pytest.mark.promise("Rollouts of vLLM have the tokens and gradients of transformers")
@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_are_those_of_transformers(runs, kind):
    """Of the second step too: vLLM has got the weights that the first one left."""
    ours, vllms = runs[kind]
    assert len(ours.said) == 2
    assert vllms.said == ours.said
    assert vllms.flags == ours.flags
    assert ours.said[0] != ours.said[1]


@pytest.mark.promise("Rollouts of vLLM have the tokens and gradients of transformers")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_transformers(runs, kind):
    ours, vllms = runs[kind]
    assert relative_error(vllms.gradients, ours.gradients) < 1e-5
