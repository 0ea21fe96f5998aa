"""Each Triton kernel against the same operator on the CPU: on a GPU as compiled, without one interpreted."""

from __future__ import annotations

import pytest
import torch

from qscope_posttrain.kernels.decode import _sparse_decode, _values_gradient, _weight_gradient
from qscope_posttrain.kernels.penalty import (
    _feature_penalty,
    _feature_preactivations,
    _penalty_gradient,
    input_gradient,
)
from qscope_posttrain.kernels.statistics import _feature_statistics_
from qscope_posttrain.kernels.steering import _steer_add

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = CLOSE[expected.dtype]
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.promise("Triton kernels give what torch gives, in Triton's interpreter")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_sparse_decode(triton_device, dtype, with_bias):
    from qscope_posttrain.kernels.triton.decode import dot_rows_, sum_rows

    tokens, width, d_sae, d_model = 5, 19, 13, 21
    values, table = normal(tokens, width, dtype=dtype), normal(d_sae, d_model, dtype=dtype, seed=1)
    indices = torch.randint(d_sae, (tokens, width), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    bias = normal(d_model, dtype=dtype, seed=3) if with_bias else None
    gradient = normal(tokens, d_model, dtype=dtype, seed=4)
    v, i, t, g = (tensor.to(triton_device) for tensor in (values, indices, table, gradient))
    b = None if bias is None else bias.to(triton_device)
    found = sum_rows(v.flatten(), i.flatten(), t, segments=tokens, bias=b)
    assert_close(found, _sparse_decode(values, indices, table, bias))
    dots = torch.empty_like(v)
    dot_rows_(dots, g, i, t)
    assert_close(dots, _values_gradient(gradient, indices, table))
    features, order = i.flatten().sort(stable=True)
    bounds = torch.searchsorted(features, torch.arange(d_sae + 3, dtype=torch.int32, device=triton_device))
    found = sum_rows(v.flatten()[order], order // width, g, segments=d_sae + 2, starts=bounds)
    assert_close(found, _weight_gradient(gradient, values, indices, d_sae + 2))


@pytest.mark.parametrize("column", [lambda table: table[:, 3], lambda table: table[0, :1].expand(len(table))])
def test_strided_and_expanded_biases_are_read_right(triton_device, column):
    from qscope_posttrain.kernels.select import topk_product
    from qscope_posttrain.kernels.triton.decode import sum_rows

    values, indices, table = normal(3, 4), torch.randint(32, (3, 4)), normal(32, 16)
    b_dec, b_enc = column(normal(16, 5).to(triton_device)), column(normal(64, 7).to(triton_device))
    v, i, t = (tensor.to(triton_device) for tensor in (values.flatten(), indices.flatten(), table))
    found = sum_rows(v, i, t, segments=3, bias=b_dec)
    assert_close(found, _sparse_decode(values, indices, table, b_dec.cpu()))
    x, W_enc = normal(4, 16).to(triton_device), normal(64, 16, seed=1).to(triton_device)
    found = topk_product(x, W_enc, b_enc, 4, torch.float32, triton=True)
    expected = topk_product(x, W_enc, b_enc.contiguous(), 4, torch.float32, triton=False)
    assert torch.equal(found[1], expected[1])
    assert_close(found[0], expected[0].cpu())


@pytest.mark.promise("Triton kernels give what torch gives, in Triton's interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_model", [1, 21, 600])
def test_chosen_preactivations(triton_device, dtype, d_model):
    """Entries in their ranges within the error that the proof in `certified` allows; no other is touched."""
    from qscope_posttrain.kernels.triton.decode import dot_rows_

    tokens, width, d_sae = 9, 37, 40
    x, W_enc = normal(tokens, d_model), normal(d_sae, d_model, dtype=dtype, seed=1)
    b_enc = normal(d_sae, 3, dtype=dtype, seed=2)[:, 1]
    indices = torch.randint(d_sae, (tokens, width), dtype=torch.int32)
    first = torch.tensor([0, 0, 3, 16, 17, 30, 36, 5, 20], dtype=torch.int32)
    last = torch.tensor([37, 0, 40, 32, 17, 31, 37, 4, 37], dtype=torch.int32)
    out = torch.full((tokens, width), 99.0, device=triton_device)
    dot_rows_(out, *(tensor.to(triton_device) for tensor in (x, indices, W_enc, b_enc, first, last)))
    place = torch.arange(width)
    inside = (place >= first[:, None]) & (place < last[:, None])
    assert bool((out.cpu()[~inside] == 99).all())
    exact = (x.double() @ W_enc.double().T + b_enc.double()).gather(1, indices.long())
    sizes = (x.double().abs() @ W_enc.double().abs().T + b_enc.double().abs()).gather(1, indices.long())
    assert bool(((out.cpu() - exact).abs() <= (d_model + 2) * 2.0**-23 * sizes)[inside].all())


def test_sparse_decode_of_nothing(triton_device):
    from qscope_posttrain.kernels.triton.decode import sum_rows

    empty = torch.zeros(0, device=triton_device)
    table, bias = normal(3, 4).to(triton_device), normal(4).to(triton_device)
    assert sum_rows(empty, empty.int(), table, segments=0).shape == (0, 4)
    assert torch.equal(sum_rows(empty, empty.int(), table, segments=2, bias=bias), bias.expand(2, -1))


@pytest.mark.promise("Triton kernels give what torch gives, in Triton's interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "features", "d_model"), [(1, 1, 16), (37, 16, 70), (33, 65, 20), (0, 3, 8), (4, 0, 8)]
)
def test_readout_and_back(triton_device, dtype, tokens, features, d_model):
    from qscope_posttrain.kernels.triton.penalty import preactivations, spread

    x, rows, bias = normal(2 * tokens, d_model, dtype=dtype)[::2], normal(features, d_model, seed=1), normal(features)
    on_device = [tensor.to(triton_device) for tensor in (x, rows, bias)]
    found = preactivations(*on_device)
    assert found.dtype == torch.float32
    assert_close(found, _feature_preactivations(x, rows, bias))
    gradient = normal(tokens, features, seed=3)
    found = spread(gradient.to(triton_device), on_device[1], dtype)
    assert found.dtype == dtype
    assert_close(found, input_gradient(gradient, rows, dtype))


@pytest.mark.promise("Triton kernels give what torch gives, in Triton's interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "features", "d_model"), [(37, 3, 70), (33, 70, 20), (0, 3, 8)])
def test_penalty(triton_device, dtype, tokens, features, d_model):
    from qscope_posttrain.kernels.triton.penalty import feature_penalty, spread

    generator = torch.Generator().manual_seed(1)
    x, rows, bias = normal(tokens, d_model, dtype=dtype), normal(features, d_model, seed=1), normal(features)
    thresholds, groups = normal(4, features, seed=2), torch.randint(-1, 4, (tokens,), generator=generator)
    mask = (torch.rand(tokens, generator=generator) > 0.3) & (groups >= 0)
    x[~mask] = torch.nan
    arguments = (x, rows, bias, thresholds, groups, mask)
    moved = [tensor.to(triton_device) for tensor in arguments]
    expected, found = _feature_penalty(*arguments), feature_penalty(*moved)
    assert_close(found[0], expected[0])
    assert torch.equal(found[1].cpu(), expected[1])
    assert torch.equal(found[2].cpu(), expected[2])
    gradient = normal(features, seed=5)
    back = spread(found[2], moved[1], dtype, gradient.to(triton_device))
    assert_close(back, _penalty_gradient(gradient, expected[2], rows, dtype))


def test_a_nan_of_a_counted_token_shows(triton_device):
    from qscope_posttrain.kernels.triton.penalty import feature_penalty

    x = torch.zeros(3, 16, device=triton_device)
    x[1] = torch.nan
    rows, zero = torch.ones(2, 16, device=triton_device), torch.zeros(2, device=triton_device)
    counted = torch.ones(3, dtype=torch.bool, device=triton_device)
    groups = torch.zeros(3, dtype=torch.int64, device=triton_device)
    sums, *_ = feature_penalty(x, rows, zero, zero[None], groups, counted)
    assert bool(sums.isnan().all())


@pytest.mark.promise("Triton kernels give what torch gives, in Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(triton_device, dtype):
    from qscope_posttrain.kernels.triton.statistics import feature_statistics_

    generator = torch.Generator().manual_seed(0)
    values = normal(300, 7, dtype=dtype)
    values[values.abs() < 0.3] = 0
    indices = torch.randint(11, (300, 7), dtype=torch.int32, generator=generator)
    groups = torch.randint(-1, 3, (300,), generator=generator)
    values[groups < 0] = torch.nan

    def sums(device: torch.device) -> list[torch.Tensor]:
        zeros = torch.zeros(3, 11, device=device)
        return [zeros.double(), zeros.long(), zeros.clone()]

    expected, found = sums(torch.device("cpu")), sums(triton_device)
    _feature_statistics_(values, indices, groups, *expected)
    feature_statistics_(*(tensor.to(triton_device) for tensor in (values, indices, groups)), *found)
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-13, atol=1e-13)
    assert torch.equal(found[1].cpu(), expected[1])
    assert torch.equal(found[2].cpu(), expected[2])


@pytest.mark.promise("Triton kernels give what torch gives, in Triton's interpreter")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_steering(triton_device, dtype):
    from qscope_posttrain.kernels.triton.steering import steer_add

    hidden = normal(5, 3, 21, dtype=dtype).transpose(0, 1)
    hidden[0, 0, :4] = torch.tensor([-0.0, torch.nan, torch.inf, -torch.inf])
    directions = normal(2, 21, seed=1)
    strengths = normal(3, 1, 2, seed=2).expand(3, 5, 2).clone()
    strengths[0, 0] = 0
    strengths[1, :, 1] = 0
    arguments = [tensor.to(triton_device) for tensor in (hidden, directions, strengths)]
    out = torch.empty_like(arguments[0])
    steer_add(*arguments, out)
    expected = _steer_add(hidden, directions, strengths)
    torch.testing.assert_close(out.cpu(), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype], equal_nan=True)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(out[0, 0].cpu().contiguous().view(bits), hidden[0, 0].contiguous().view(bits))
    steer_add(*arguments, arguments[0])
    assert torch.equal(arguments[0].cpu().nan_to_num(), out.cpu().nan_to_num())


def test_offsets_beyond_int32(triton_device):
    """Rows 2**31 elements apart. Of the memory between them no page is ever touched."""
    from qscope_posttrain.kernels.triton.penalty import feature_penalty, preactivations
    from qscope_posttrain.kernels.triton.steering import steer_add

    far = torch.empty(2, 2**31 + 8, dtype=torch.bfloat16, device=triton_device)[:, :8]
    far[0], far[1] = 1.0, 2.0
    rows, bias = normal(3, 8, seed=1).to(triton_device), normal(3).to(triton_device)
    expected = preactivations(far.contiguous(), rows, bias)
    assert torch.equal(preactivations(far, rows, bias), expected)
    counted = torch.ones(2, dtype=torch.bool, device=triton_device)
    sums, *_ = feature_penalty(far, rows, bias, bias[None] * 0, counted.long() * 0, counted)
    torch.testing.assert_close(sums, expected.relu().sum(0))
    steer_add(far.unsqueeze(1), rows[:1], torch.ones(2, 1, 1, device=triton_device), far.unsqueeze(1))
    torch.testing.assert_close(far[1].float(), 2.0 + rows[0], rtol=2**-7, atol=2**-7)
