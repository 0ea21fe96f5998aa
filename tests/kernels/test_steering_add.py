"""Additive steering against its formula, and entries that must not change a bit."""

from __future__ import annotations

import pytest
import torch

from qscope_posttrain.kernels.steering import _steer_add, _steer_add_, steer_add, steer_add_

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def case(rows, tokens, d_model, count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        normal(rows, tokens, d_model).to(dtype),
        normal(count, d_model).to(wide),
        normal(rows, tokens, count).to(wide),
    )


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 1), (3, 5, 33, 4), (1, 1, 1, 16), (0, 3, 8, 2), (2, 0, 8, 2), (2, 3, 8, 0)]
)
def test_against_float64(dtype, shape):
    hidden, directions, strengths = case(*shape, dtype)
    found = steer_add(hidden, directions, strengths)
    expected = hidden.double() + torch.einsum("btn,nd->btd", strengths.double(), directions.double())
    assert found.dtype == dtype
    rounding = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=4e-6)
    in_place = hidden.clone()
    assert steer_add_(in_place, directions, strengths) is None
    assert torch.equal(in_place, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3])
def test_strength_zero_changes_no_bit(dtype, count):
    hidden, directions, strengths = case(3, 4, 6, count, dtype)
    odd = torch.tensor([-0.0, torch.nan, torch.inf, -torch.inf, 0.0, 1e-8])
    hidden[1] = odd
    hidden[0, 2] = odd
    strengths[1] = 0
    strengths[0, 2] = -0.0
    found = steer_add(hidden, directions, strengths)
    assert torch.equal(bits(found[1]), bits(hidden[1]))
    assert torch.equal(bits(found[0, 2]), bits(hidden[0, 2]))
    assert not bool((found[2] == hidden[2]).all(-1).any())
    in_place = hidden.clone()
    steer_add_(in_place, directions, strengths)
    assert torch.equal(bits(in_place), bits(found))


def test_strength_one_of_a_cast_vector_is_plain_addition():
    """What a steering hook relies on: rows behind a mask change as they would without one."""
    for dtype in DTYPES:
        hidden, directions, _ = case(3, 4, 6, 1, dtype)
        shift = directions.to(dtype)
        assert torch.equal(steer_add(hidden, shift, torch.ones(3, 1, 1)), hidden + shift[0])


def test_strides_and_broadcast_strengths():
    hidden, directions, _ = case(3, 4, 6, 2)
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    per_row = torch.tensor([0.5, 0.0, -1.0]).view(3, 1, 1).expand(3, 1, 2)
    expected = steer_add(hidden, directions, per_row.expand(3, 4, 2).contiguous())
    assert torch.equal(steer_add(strided, directions, per_row), expected)
    steer_add_(strided, directions, per_row)
    assert torch.equal(strided, expected)


def test_gradcheck():
    inputs = [tensor.requires_grad_() for tensor in case(2, 3, 4, 2, torch.float64)]
    assert torch.autograd.gradcheck(steer_add, inputs)
    per_row = torch.randn(2, 1, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(steer_add, (*inputs[:2], per_row))


def test_opcheck_and_compile():
    hidden, directions, strengths = case(2, 3, 4, 2)
    torch.library.opcheck(_steer_add, (hidden.clone().requires_grad_(), directions, strengths))
    torch.library.opcheck(_steer_add, tuple(t.clone().requires_grad_() for t in (hidden, directions, strengths)))
    torch.library.opcheck(_steer_add_, (hidden.clone(), directions, strengths))
    expected = steer_add(hidden, directions, strengths)

    def in_place(hidden):
        steer_add_(hidden, directions, strengths)
        return hidden.sum()

    compiled = torch.compile(steer_add, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, directions, strengths), expected)
    changed = hidden.clone()
    torch.compile(in_place, fullgraph=True, backend="aot_eager")(changed)
    assert torch.equal(changed, expected)


def test_autocast_changes_nothing():
    hidden, directions, strengths = case(2, 3, 4, 2)
    expected = steer_add(hidden, directions, strengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(steer_add(hidden, directions, strengths), expected)


def test_bad_input():
    hidden, directions, strengths = case(2, 3, 4, 2)
    with pytest.raises(ValueError, match=r"directions must be \[directions, 4\]"):
        steer_add(hidden, directions[:, :3], strengths)
    with pytest.raises(ValueError, match="hidden must be"):
        steer_add(hidden[0], directions, strengths)
    with pytest.raises(ValueError, match=r"strengths must expand to .*\[2, 3, 2\]"):
        steer_add(hidden, directions, strengths[:, :2])
    with pytest.raises(TypeError, match=r"strengths must be .*float32"):
        steer_add(hidden, directions, strengths.int())
    with pytest.raises(ValueError, match="directions is on meta"):
        steer_add(hidden, directions.to("meta"), strengths)
    with pytest.raises(ValueError, match="without a gradient"):
        steer_add_(hidden.requires_grad_(), directions, strengths)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_in_a_cuda_graph():
    """Captured once, replayed with other strengths written into the same tensor; nothing is allocated."""
    hidden, directions, strengths = (tensor.cuda() for tensor in case(4, 1, 96, 3))
    start = hidden.clone()
    steer_add_(hidden, directions, strengths)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph):
        steer_add_(hidden, directions, strengths)
    assert torch.cuda.memory_allocated() == before
    for seed in (1, 2):
        strengths.copy_(case(4, 1, 96, 3, seed=seed)[2])
        strengths[1] = 0
        hidden.copy_(start)
        graph.replay()
        torch.testing.assert_close(hidden, steer_add(start, directions, strengths))
        assert torch.equal(hidden[1], start[1])
