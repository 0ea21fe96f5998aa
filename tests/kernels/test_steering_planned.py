"""`steer_planned_` against the sum written out, on a CPU and as a Triton kernel."""

from __future__ import annotations

import pytest
import torch

from qscope_posttrain.kernels.steering import EDITS, steer_planned_

TOKENS, WIDTH = 7, 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_triton(*tensors):
    """The kernel itself, in Triton's interpreter where no GPU is."""
    pytest.importorskip("triton")
    from qscope_posttrain.kernels.triton.steering import steer_planned

    moved = [tensor if tensor is None else tensor.to(DEVICE) for tensor in tensors]
    steer_planned(*moved)
    for tensor, there in zip(tensors, moved, strict=True):
        if tensor is not None:
            tensor.copy_(there)


def a_plan(edits):
    """A plan of twice as many tokens as the batch has, from {token: [(row of the table, strength), ...]}."""
    plan = torch.zeros(2 * TOKENS, 2 * EDITS, dtype=torch.int32)
    for token, entries in edits.items():
        for place, (row, strength) in enumerate(entries):
            plan[token, place] = row
            plan[token, EDITS + place] = torch.tensor(strength, dtype=torch.float32).view(torch.int32)
    return plan


EDITS_OF = {1: [(2, 3.0)], 4: [(1, -0.7), (3, 2.5), (0, 0.0), (2, 1e-3)], 6: [(0, 0.0), (3, 1.0)], 9: [(1, 5.0)]}


@pytest.mark.parametrize("run", [steer_planned_, on_triton], ids=["operator", "triton"])
@pytest.mark.parametrize("two", [False, True], ids=["hidden", "hidden and residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_named_tokens_get_their_sum_and_others_keep_their_bits(run, two, dtype):
    hidden, residual = torch.randn(2, TOKENS, WIDTH).to(dtype)
    hidden[0, 0] = -0.0
    hidden[2, 1] = float("nan")
    table = torch.randn(4, WIDTH)
    table[0] = 0
    before, other = hidden.clone(), residual.clone()
    steered = torch.tensor([10])
    run(hidden, residual if two else None, table, a_plan(EDITS_OF), steered)
    stream = before.float() + other.float() if two else before.float()
    for token in range(TOKENS):
        if token not in EDITS_OF:
            assert torch.equal(hidden[token].view(torch.uint8), before[token].view(torch.uint8))
            assert torch.equal(residual[token], other[token])
            continue
        expected = stream[token].clone()
        for row, strength in EDITS_OF[token]:
            expected += strength * table[row]
        found = residual[token] if two else hidden[token]
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)
        assert not two or not hidden[token].any()
    assert torch.equal(residual, other) or two
    assert steered.tolist() == [13]  # Token 9 is not in the batch


@pytest.mark.parametrize("run", [steer_planned_, on_triton], ids=["operator", "triton"])
def test_a_plan_without_entries_changes_nothing(run):
    hidden, steered = torch.randn(TOKENS, WIDTH), torch.tensor([0])
    before = hidden.clone()
    run(hidden, None, torch.randn(4, WIDTH), a_plan({}), steered)
    assert torch.equal(hidden, before)
    assert steered.item() == 0


def test_a_batch_longer_than_the_plan_is_refused():
    with pytest.raises(ValueError, match="the plan holds 14 tokens, but the batch has 15"):
        steer_planned_(torch.zeros(15, WIDTH), None, torch.zeros(4, WIDTH), a_plan({}), torch.tensor([0]))


def test_a_compiled_graph_reads_the_plan_of_each_call():
    """The operator is opaque to the compiler, and its changes in place survive functionalization."""
    table, plan, steered = torch.randn(4, WIDTH), a_plan({}), torch.tensor([0])

    def layers(hidden, residual):
        hidden = hidden * 2
        steer_planned_(hidden, residual, table, plan, steered)
        return hidden + residual

    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    for edits in ({}, EDITS_OF, {0: [(1, 2.0)]}, {}):
        plan.copy_(a_plan(edits))
        hidden, residual = torch.randn(2, TOKENS, WIDTH)
        torch.testing.assert_close(compiled(hidden, residual.clone()), layers(hidden, residual.clone()))
    assert steered.item() == 2 * (3 + 1)
