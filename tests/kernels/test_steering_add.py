"""Additive steering against its formula, and entries that must not change a bit."""

from __future__ import annotations

import pytest
import torch

from qscope_posttrain.kernels.steering import _steer_add, steer_add

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


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
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


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
def test_gradcheck():
    inputs = [tensor.requires_grad_() for tensor in case(2, 3, 4, 2, torch.float64)]
    assert torch.autograd.gradcheck(steer_add, inputs)
    per_row = torch.randn(2, 1, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(steer_add, (*inputs[:2], per_row))


def test_opcheck_and_compile():
    hidden, directions, strengths = case(2, 3, 4, 2)
    torch.library.opcheck(_steer_add, (hidden.clone().requires_grad_(), directions, strengths))
    torch.library.opcheck(_steer_add, tuple(t.clone().requires_grad_() for t in (hidden, directions, strengths)))
    expected = steer_add(hidden, directions, strengths)
    compiled = torch.compile(steer_add, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, directions, strengths), expected)


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
