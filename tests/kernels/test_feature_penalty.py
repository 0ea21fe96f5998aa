"""Readouts and the penalty on them against float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qscope_posttrain.kernels.penalty import (
    _feature_penalty,
    _feature_preactivations,
    _penalty_gradient,
    feature_penalty,
    feature_preactivations,
    input_gradient,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(11, 1, 32), (7, 16, 33), (1030, 3, 8), (5, 64, 20), (0, 3, 8), (6, 0, 8)]


def case(tokens, features, d_model, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = normal(tokens, d_model).to(dtype)
    rows, bias, thresholds = normal(features, d_model).to(wide), normal(features).to(wide), normal(4, features).to(wide)
    groups = torch.randint(-1, 4, (tokens,), generator=generator)
    mask = (torch.rand(tokens, generator=generator) > 0.3) & (groups >= 0)
    return x, rows, bias, thresholds, groups, mask


def excess(x, rows, bias, thresholds, groups, mask):
    """The definition in float64, [T, F]."""
    f = x.double() @ rows.double().T + bias.double() - thresholds.double()[groups.clamp(min=0)]
    return torch.where(mask[:, None], f.relu(), 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_preactivations_against_float64(dtype, shape):
    x, rows, bias, *_ = case(*shape, dtype)
    x = x.requires_grad_()
    found = feature_preactivations(x, rows, bias)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = x.double() @ rows.double().T + bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=found.dtype)
    (back,) = torch.autograd.grad(found, x, gradient)
    assert back.dtype == dtype
    reference = gradient.double() @ rows.double()
    rounding = 1e-5 if dtype in (torch.float64, torch.float32) else 2**-8
    torch.testing.assert_close(back.double(), reference, rtol=rounding, atol=1e-4)


def test_preactivations_of_any_shape_and_strides():
    x, rows, bias, *_ = case(24, 3, 10)
    expected = feature_preactivations(x, rows, bias)
    assert torch.equal(feature_preactivations(x.view(2, 3, 4, 10), rows, bias), expected.view(2, 3, 4, 3))
    torch.testing.assert_close(feature_preactivations(x[5], rows, bias), expected[5])
    strided = x.t().contiguous().t()
    torch.testing.assert_close(feature_preactivations(strided, rows, bias), expected)


def test_preactivations_gradcheck():
    x, rows, bias, *_ = case(5, 3, 4, torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, rows, bias)]
    assert torch.autograd.gradcheck(feature_preactivations, inputs)


def test_autocast_changes_nothing():
    x, rows, bias, thresholds, groups, mask = case(9, 3, 64)
    plain = feature_preactivations(x, rows, bias)
    sums = feature_penalty(x, rows, bias, thresholds, mask, groups=groups).sums
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(feature_preactivations(x, rows, bias), plain)
        assert torch.equal(feature_penalty(x, rows, bias, thresholds, mask, groups=groups).sums, sums)
    low = feature_preactivations(x.bfloat16(), rows, bias)
    assert torch.equal(low, feature_preactivations(x.bfloat16().float(), rows, bias))


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_penalty_against_float64(dtype, shape):
    x, rows, bias, thresholds, groups, mask = case(*shape, dtype)
    expected = excess(x, rows, bias, thresholds, groups, mask)
    leaf = x.clone().requires_grad_()
    found = feature_penalty(leaf, rows, bias, thresholds, mask, groups=groups)
    torch.testing.assert_close(found.sums.double(), expected.sum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(found.above, (expected > 0).any(1))
    scale = torch.linspace(-1, 2, shape[1], dtype=found.sums.dtype)
    (back,) = torch.autograd.grad((found.sums * scale).sum(), leaf)
    coefficients = (expected > 0) * scale.double()
    rounding = 1e-5 if dtype in (torch.float64, torch.float32) else 2**-8
    torch.testing.assert_close(back.double(), coefficients @ rows.double(), rtol=rounding, atol=1e-4)


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
def test_penalty_gradcheck():
    x, rows, bias, thresholds, groups, mask = case(6, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h: feature_penalty(h, rows, bias, thresholds, mask, groups=groups).sums,
        (x.requires_grad_(),),
    )


def test_three_forms_of_thresholds_agree():
    x, rows, bias, thresholds, _, mask = case(12, 3, 8)
    one = feature_penalty(x, rows, bias, thresholds[2], mask)
    grouped = feature_penalty(x, rows, bias, thresholds, mask, groups=torch.full((12,), 2))
    each = feature_penalty(x, rows, bias, thresholds[2].expand(12, 3), mask)
    for other in (grouped, each):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_packed_batch_equals_its_documents():
    """Two documents of different groups in one row, with padding between that holds NaN."""
    x, rows, bias, thresholds, *_ = case(12, 3, 8)
    x[5:7] = torch.nan
    groups = torch.tensor([0] * 5 + [-1] * 2 + [3] * 5)
    packed = x.clone().view(1, 12, 8).requires_grad_()
    found = feature_penalty(packed, rows, bias, thresholds, (groups >= 0)[None], groups=groups[None])
    found.sums.sum().backward()
    total, gradients = torch.zeros(3), []
    for part, group in ((slice(0, 5), 0), (slice(7, 12), 3)):
        document = x[part].clone().requires_grad_()
        one = feature_penalty(document, rows, bias, thresholds[group], torch.ones(5, dtype=torch.bool))
        one.sums.sum().backward()
        total += one.sums.detach()
        gradients.append(document.grad)
    torch.testing.assert_close(found.sums, total)
    torch.testing.assert_close(packed.grad[0, :5], gradients[0])
    torch.testing.assert_close(packed.grad[0, 7:], gradients[1])
    assert torch.equal(packed.grad[0, 5:7], torch.zeros(2, 8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_masked_row_does_not_leak_and_a_counted_one_shows(bad):
    x, rows, bias, thresholds, groups, mask = case(9, 3, 8)
    expected = feature_penalty(x, rows, bias, thresholds, mask, groups=groups)
    x[~mask] = bad
    leaf = x.requires_grad_()
    found = feature_penalty(leaf, rows, bias, thresholds, mask, groups=groups)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found.sums.sum().backward()
    assert bool(leaf.grad.isfinite().all())
    if math.isnan(bad):
        broken = x.detach().clone()
        broken[mask.nonzero()[0]] = bad
        assert bool(feature_penalty(broken, rows, bias, thresholds, mask, groups=groups).sums.isnan().all())


class Operations(TorchDispatchMode):
    """Names of all operations that are dispatched, and the largest fp32 or fp64 tensor that one makes."""

    def __init__(self):
        super().__init__()
        self.names, self.widest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float64):
                self.widest = max(self.widest, value.numel())
        return result


def test_few_operations_and_no_look_at_a_value():
    x, rows, bias, thresholds, groups, mask = case(64, 3, 8)
    leaf, scale = x.requires_grad_(), torch.tensor(0.5)
    with Operations() as seen:
        found = feature_penalty(leaf, rows, bias, thresholds, mask, groups=groups)
        (found.sums.sum() * scale).backward()
    assert not [name for name in seen.names if "local_scalar" in name or "item" in name or "nonzero" in name]
    assert sum("feature_penalty.default" in name for name in seen.names) == 1
    assert sum("feature_penalty_gradient.default" in name for name in seen.names) == 1
    assert len(seen.names) <= 20, seen.names


def test_half_precision_is_widened_by_tiles_only():
    tokens, d_model = 5000, 32
    x, rows, bias, thresholds, groups, mask = case(tokens, 3, d_model, torch.bfloat16)
    with Operations() as seen:
        _, _, active = _feature_penalty._init_fn(x, rows, bias, thresholds, groups, mask)
        _penalty_gradient._init_fn(torch.ones(3), active, rows, torch.bfloat16)
        _feature_preactivations._init_fn(x, rows, bias)
    assert seen.widest == 1024 * d_model


def test_only_a_bool_per_token_and_feature_is_saved():
    x, rows, bias, thresholds, groups, mask = case(64, 3, 40)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        feature_penalty(x.requires_grad_(), rows, bias, thresholds, mask, groups=groups)
    shapes = sorted((tuple(tensor.shape), tensor.dtype) for tensor in saved)
    assert shapes == [((3, 40), torch.float32), ((64, 3), torch.bool)]


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
def test_opcheck():
    x, rows, bias, thresholds, groups, mask = case(6, 3, 4)
    for leaf in (x.clone().requires_grad_(), x.bfloat16().requires_grad_()):
        torch.library.opcheck(_feature_preactivations, (leaf, rows, bias))
        torch.library.opcheck(_feature_penalty, (leaf, rows, bias, thresholds, groups, mask))
    torch.library.opcheck(_feature_preactivations, tuple(t.clone().requires_grad_() for t in (x, rows, bias)))
    torch.library.opcheck(input_gradient, (torch.randn(6, 3), rows, torch.bfloat16))
    torch.library.opcheck(_penalty_gradient, (torch.randn(3), torch.rand(6, 3) > 0.5, rows, torch.bfloat16))


@pytest.mark.promise("Operators compile without a graph break")
def test_compiles_without_a_graph_break():
    x, rows, bias, thresholds, groups, mask = case(6, 3, 4)

    def total(h):
        found = feature_penalty(h, rows, bias, thresholds, mask, groups=groups)
        return found.sums.sum() + feature_preactivations(h, rows, bias).mean()

    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    total(eager).backward()
    torch.compile(total, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_bad_input():
    x, rows, bias, thresholds, groups, mask = case(6, 3, 4)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 4\]"):
        feature_preactivations(x[:, :3], rows, bias)
    with pytest.raises(ValueError, match="rows is on meta"):
        feature_preactivations(x, rows.to("meta"), bias)
    with pytest.raises(TypeError, match=r"x must be .*float32"):
        feature_preactivations(x.int(), rows, bias)
    with pytest.raises(ValueError, match="mask must have one entry per token"):
        feature_penalty(x, rows, bias, thresholds, mask[:5], groups=groups)
    with pytest.raises(TypeError, match="mask must be bool"):
        feature_penalty(x, rows, bias, thresholds, mask.float(), groups=groups)
    with pytest.raises(ValueError, match=r"thresholds must be \[groups, 3\]"):
        feature_penalty(x, rows, bias, thresholds[:, :2], mask, groups=groups)
    with pytest.raises(ValueError, match=r"thresholds must be \[6, 3\]"):
        feature_penalty(x, rows, bias, thresholds, mask)
    with pytest.raises(ValueError, match="detach"):
        feature_penalty(x, rows.clone().requires_grad_(), bias, thresholds, mask, groups=groups)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_the_device():
    tensors = [tensor.cuda() for tensor in case(300, 3, 64, torch.bfloat16)]
    x, rows, bias, thresholds, groups, mask = tensors
    leaf, scale = x.requires_grad_(), torch.tensor(0.5, device="cuda")

    def step():
        found = feature_penalty(leaf, rows, bias, thresholds, mask, groups=groups)
        (found.sums.sum() * scale).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
