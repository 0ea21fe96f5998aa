"""Sparse decode against a dense float64 code, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qscope_posttrain.kernels import decode
from qscope_posttrain.kernels.decode import _sparse_decode, _values_gradient, _weight_gradient, sparse_decode

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def case(tokens, width, d_sae, d_model, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    indices = torch.randint(d_sae, (tokens, width), generator=generator, dtype=torch.int32)
    W_dec = torch.randn(d_sae, d_model, generator=generator, dtype=torch.float64).to(dtype)
    b_dec = torch.randn(d_model, generator=generator, dtype=torch.float64).to(dtype)
    return values, indices, W_dec, b_dec


def dense(values, indices, W_dec, b_dec):
    """The definition, through a dense code that adds up duplicates."""
    code = values.new_zeros(len(values), len(W_dec)).scatter_add(1, indices.long(), values)
    return code @ W_dec if b_dec is None else code @ W_dec + b_dec


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("tokens", "width", "d_sae", "d_model"),
    [(7, 5, 40, 12), (9, 2, 64, 12), (3, 50, 64, 33), (9, 100, 30, 7), (1, 1, 1, 1), (0, 4, 8, 6)],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients_against_float64(dtype, tokens, width, d_sae, d_model, with_bias):
    values, indices, W_dec, b_dec = case(tokens, width, d_sae, d_model, dtype)
    inputs = [values, W_dec, b_dec] if with_bias else [values, W_dec]
    narrow = [tensor.clone().requires_grad_() for tensor in inputs]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    found = sparse_decode(narrow[0], indices, narrow[1], narrow[2] if with_bias else None)
    expected = dense(exact[0], indices, exact[1], exact[2] if with_bias else None)
    assert found.dtype == dtype
    tolerance = ROUNDING[dtype]
    scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * scale)
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    found.backward(gradient)
    expected.backward(gradient.double())
    for ours, reference in zip(narrow, exact, strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype == dtype
        scale = float(reference.grad.abs().max()) if reference.grad.numel() else 1.0
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=tolerance, atol=2 * tolerance * scale)


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
def test_gradcheck_with_duplicate_indices():
    values, _, W_dec, b_dec = case(4, 3, 5, 6, torch.float64)
    indices = torch.tensor([[0, 0, 1], [4, 4, 4], [2, 3, 1], [0, 1, 0]])
    inputs = [tensor.requires_grad_() for tensor in (values, W_dec, b_dec)]
    assert torch.autograd.gradcheck(lambda v, W, b: sparse_decode(v, indices, W, b), inputs)


@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(1, 9),
    st.integers(0, 1000),
    st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=60, deadline=None)
def test_any_indices(tokens, width, d_sae, seed, kind):
    """Few features and many entries: duplicates, features that never fire, one that always does."""
    values, indices, W_dec, b_dec = case(tokens, width, d_sae, 5, torch.float64, seed)
    values, W_dec = values.requires_grad_(), W_dec.requires_grad_()
    found = sparse_decode(values, indices.to(kind), W_dec, b_dec)
    expected = dense(values, indices, W_dec, b_dec)
    torch.testing.assert_close(found, expected)
    gradient = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    ours = torch.autograd.grad(found, (values, W_dec), gradient)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (values, W_dec), gradient))


def test_an_empty_code_is_the_bias():
    _, _, W_dec, b_dec = case(1, 1, 4, 3)
    empty = torch.zeros(2, 0, requires_grad=True)
    weight = W_dec.requires_grad_()
    x_hat = sparse_decode(empty, torch.zeros(2, 0, dtype=torch.int32), weight, b_dec)
    assert torch.equal(x_hat, b_dec.expand(2, -1))
    x_hat.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(4, 3))


def test_a_row_that_is_not_finite_stays_alone():
    values, indices, W_dec, b_dec = case(4, 3, 9, 6)
    expected = sparse_decode(values, indices, W_dec, b_dec)
    values[1] = torch.nan
    values[2, 0] = torch.inf
    found = sparse_decode(values, indices, W_dec, b_dec)
    assert torch.equal(found[[0, 3]], expected[[0, 3]])
    assert bool(found[1].isnan().all())


def test_strides_and_half_precision_weights():
    values, indices, W_dec, b_dec = case(6, 4, 10, 8)
    expected = sparse_decode(values, indices, W_dec, b_dec)
    strided = W_dec.t().contiguous().t()
    assert torch.equal(
        sparse_decode(values.t().contiguous().t(), indices.t().contiguous().t(), strided, b_dec), expected
    )
    low = sparse_decode(values, indices, W_dec.bfloat16(), b_dec.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.1)


def test_backward_repeats_bit_for_bit():
    values, indices, W_dec, _ = case(200, 20, 30, 16)

    def gradients():
        inputs = [tensor.clone().requires_grad_() for tensor in (values, W_dec)]
        sparse_decode(inputs[0], indices, inputs[1]).square().sum().backward()
        return [tensor.grad for tensor in inputs]

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


def test_dense_and_sparse_backward_agree(monkeypatch):
    """Whatever the cost decides, also by tiles, and with duplicates."""
    values, indices, W_dec, _ = case(50, 6, 20, 8, torch.float64)
    gradient = torch.randn(50, 8, dtype=torch.float64)
    found = {}
    for name, limit in (("sparse", 0), ("dense", 16), ("tiles", 16)):
        monkeypatch.setattr(decode, "DENSE_BELOW", limit)
        monkeypatch.setattr(decode, "TILE_ELEMENTS", 20 * 7 if name == "tiles" else 2**20)
        found[name] = (
            _values_gradient._init_fn(gradient, indices, W_dec),
            _weight_gradient._init_fn(gradient, values, indices, 20),
        )
    for name in ("dense", "tiles"):
        torch.testing.assert_close(found[name], found["sparse"])


def test_int32_offsets_are_widened_before_they_overflow(monkeypatch):
    values, indices, W_dec, b_dec = case(6, 4, 10, 8)
    expected = sparse_decode(values, indices, W_dec, b_dec)
    assert decode._bags(indices)[1].dtype == torch.int32
    monkeypatch.setattr(decode, "INT32_ENTRIES", 20)
    assert decode._bags(indices)[1].dtype == torch.int64
    assert torch.equal(sparse_decode(values, indices, W_dec, b_dec), expected)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_nothing_large_is_made():
    """Neither [tokens, d_sae] nor [tokens, width, d_model], forward or backward."""
    tokens, width, d_sae, d_model = 64, 20, 500, 48
    values, indices, W_dec, _ = case(tokens, width, d_sae, d_model)
    with Largest() as largest:
        decoded = _sparse_decode._init_fn(values, indices, W_dec, None)
        _values_gradient._init_fn(decoded, indices, W_dec)
        _weight_gradient._init_fn(decoded, values, indices, d_sae)
    assert largest.elements == d_sae * d_model
    assert largest.elements < min(tokens * d_sae, tokens * width * d_model)


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
def test_opcheck():
    values, indices, W_dec, b_dec = case(5, 3, 7, 4)
    inputs = [tensor.requires_grad_() for tensor in (values, W_dec, b_dec)]
    torch.library.opcheck(_sparse_decode, (inputs[0], indices, *inputs[1:]))
    torch.library.opcheck(_sparse_decode, (values, indices, W_dec, None))
    gradient = torch.randn(5, 4)
    torch.library.opcheck(_values_gradient, (gradient, indices, W_dec.detach()))
    torch.library.opcheck(_weight_gradient, (gradient, values.detach(), indices, 7))


@pytest.mark.promise("Operators compile without a graph break")
def test_compiles_without_a_graph_break():
    values, indices, W_dec, b_dec = case(5, 3, 7, 4)
    weight = W_dec.clone().requires_grad_()
    compiled = torch.compile(sparse_decode, fullgraph=True, backend="aot_eager")
    found = compiled(values, indices, weight, b_dec)
    assert torch.equal(found, sparse_decode(values, indices, W_dec, b_dec))
    found.sum().backward()
    assert weight.grad is not None


def test_autocast_changes_nothing():
    values, indices, W_dec, b_dec = case(5, 3, 7, 4)
    expected = sparse_decode(values, indices, W_dec, b_dec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse_decode(values, indices, W_dec, b_dec), expected)


def test_bad_input():
    values, indices, W_dec, b_dec = case(5, 3, 7, 4)
    with pytest.raises(ValueError, match=r"indices must be \[5, 3\]"):
        sparse_decode(values, indices[:4], W_dec)
    with pytest.raises(TypeError, match="int32 or int64"):
        sparse_decode(values, indices.short(), W_dec)
    with pytest.raises(TypeError, match="one dtype"):
        sparse_decode(values, indices, W_dec, b_dec.double())
    with pytest.raises(TypeError, match=r"values must be .*float32"):
        sparse_decode(values.int(), indices, W_dec)
    with pytest.raises(ValueError, match=r"b_dec must be \[4\]"):
        sparse_decode(values, indices, W_dec, b_dec[:3])
    with pytest.raises(ValueError, match="W_dec is on meta"):
        sparse_decode(values, indices, W_dec.to("meta"))
    with pytest.raises(ValueError, match="no rows"):
        sparse_decode(values, indices, W_dec[:0])
    with pytest.raises(RuntimeError, match="range"):
        sparse_decode(values, indices + 7, W_dec)
