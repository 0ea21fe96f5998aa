from __future__ import annotations

import pytest
import torch
from encode_oracle import dense, exact_inputs, preactivations, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qscope_posttrain.kernels import batch_topk_encode, threshold_encode

TILES = [(None, None), (3, 7), (1, 1000)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("thresholds", [0.0, 2, -1.5, torch.tensor(1.0), torch.arange(70) % 9 - 2.5])
def test_threshold_encode_is_the_formula(dtype: torch.dtype, tiles: tuple, thresholds: Tensor | float) -> None:
    x, W_enc, b_enc = exact_inputs(10, 24, 70, dtype)
    pre = preactivations(x, W_enc, b_enc)
    expected = pre.where(pre > torch.as_tensor(thresholds).double().clamp(min=0), 0)
    for precision in ("model", "fp32"):
        values, indices = threshold_encode(
            x, W_enc, b_enc, thresholds, precision=precision, tile_tokens=tiles[0], tile_features=tiles[1]
        )
        assert values.shape[1] == (expected > 0).sum(dim=1).max()
        assert torch.equal(dense(values.double(), indices, 70), expected)
        assert indices.dtype == torch.int32
        order = values.sort(dim=1, descending=True, stable=True)
        assert torch.equal(order.values, values)
        tied = (values.diff(dim=1) == 0) & (values[:, 1:] > 0)
        assert indices.diff(dim=1)[tied].gt(0).all(), "equal values by the lowest index"


def test_thresholds_are_compared_in_float32() -> None:
    """2.01 is 2.015625 in bfloat16, but the value 2.0 stays below it, and 2.015625 above."""
    x, W_enc = torch.ones(1, 1).bfloat16(), torch.tensor([[2.0], [2.015625]]).bfloat16()
    for thresholds in (2.01, torch.tensor(2.01), torch.tensor([2.01, 2.01])):
        values, indices = threshold_encode(x, W_enc, torch.zeros(2).bfloat16(), thresholds)
        assert values.tolist() == [[2.015625]]
        assert indices.tolist() == [[1]]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 20), st.integers(1, 20), st.integers(0, 999))
def test_batch_topk_keeps_the_largest_of_the_batch(
    tokens: int, k: int, tile_tokens: int, tile_features: int, seed: int
) -> None:
    x, W_enc, b_enc = exact_inputs(tokens, 6, 25, torch.float32, seed)
    flat = preactivations(x, W_enc, b_enc).flatten()
    order = flat.sort(descending=True, stable=True).indices[: k * tokens]
    expected = torch.zeros_like(flat)
    expected[order] = flat[order].relu()
    values, indices = batch_topk_encode(x, W_enc, b_enc, k, tile_tokens=tile_tokens, tile_features=tile_features)
    assert torch.equal(dense(values.double(), indices, 25), expected.view(tokens, 25))
    assert values.shape[1] == (expected.view(tokens, 25) > 0).sum(dim=1).max()


@pytest.mark.parametrize("encode", [threshold_encode, batch_topk_encode])
def test_nan_and_inf_rows_change_no_other_row(encode) -> None:  # type: ignore[no-untyped-def]
    x, W_enc, b_enc = random_inputs(6, 16, 90, torch.float32)
    x[2], x[4, 3] = torch.nan, torch.nan
    clean = [0, 1, 3, 5]
    option = (1.0,) if encode is threshold_encode else (5,)
    values, indices = encode(x, W_enc, b_enc, *option)
    assert values[[2, 4]].eq(0).all(), "NaN never fires"
    code = dense(values, indices, 90)[clean]
    pre = (x @ W_enc.T + b_enc)[clean]
    bound = 1.0 if encode is threshold_encode else pre.flatten().topk(30).values[-1]
    torch.testing.assert_close(code, pre.where(pre >= bound, 0))


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
@pytest.mark.parametrize("tiles", TILES)
def test_gradcheck(tiles: tuple) -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs(5, 4, 12, torch.float64)]
    for encode, option in ((threshold_encode, 0.3), (batch_topk_encode, 3)):
        assert torch.autograd.gradcheck(
            lambda *a, e=encode, o=option: e(*a, o, tile_tokens=tiles[0], tile_features=tiles[1])[0], inputs
        )


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
def test_opcheck() -> None:
    x, W_enc, b_enc = (tensor.requires_grad_() for tensor in random_inputs(5, 8, 30, torch.float32))
    ops = torch.ops.qscope_posttrain
    for thresholds in (torch.zeros(()), torch.rand(30)):
        torch.library.opcheck(ops.threshold_encode.default, (x, W_enc, b_enc, thresholds, False, None, None))
    torch.library.opcheck(ops.batch_topk_encode.default, (x, W_enc, b_enc, 4, True, 2, 7))


@pytest.mark.promise("Operators compile without a graph break")
def test_compiles_without_a_graph_break() -> None:
    x, W_enc, b_enc = random_inputs(6, 8, 40, torch.float32)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for encode, option in ((threshold_encode, 0.5), (batch_topk_encode, 3)):
            compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
            for left, right in zip(compiled(x, W_enc, b_enc, option), encode(x, W_enc, b_enc, option), strict=True):
                assert torch.equal(left, right)


def test_nothing_fires_and_no_tokens() -> None:
    x, W_enc, b_enc = random_inputs(4, 8, 40, torch.float32)
    for values, indices in (threshold_encode(x, W_enc, b_enc, 1e9), batch_topk_encode(x, W_enc, b_enc - 1e9, 3)):
        assert values.shape == indices.shape == (4, 0)
    x.requires_grad_()
    threshold_encode(x, W_enc, b_enc, 1e9)[0].sum().backward()
    assert x.grad.eq(0).all()
    for values, _ in (threshold_encode(x[:0], W_enc, b_enc), batch_topk_encode(x[:0], W_enc, b_enc, 3)):
        assert values.shape == (0, 0)


@pytest.mark.parametrize(
    ("thresholds", "error", "says"),
    [
        (torch.zeros(39), ValueError, r"thresholds must be \[40\], got \[39\]"),
        (torch.zeros(40, dtype=torch.int64), TypeError, "thresholds must be float16"),
        (torch.zeros(40, requires_grad=True), ValueError, "get no gradient here: pass thresholds.detach"),
        (torch.zeros(40, device="meta"), ValueError, "thresholds is on meta, x on cpu"),
    ],
)
def test_bad_thresholds(thresholds: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        threshold_encode(*random_inputs(3, 8, 40, torch.float32), thresholds)


def test_bad_options() -> None:
    inputs = random_inputs(3, 8, 40, torch.float32)
    with pytest.raises(ValueError, match="unknown precision 'certified'; choose one of model, fp32"):
        threshold_encode(*inputs, precision="certified")
    with pytest.raises(ValueError, match="k must be at least 1"):
        batch_topk_encode(*inputs, 0)
    with pytest.raises(ValueError, match=r"x must be \[tokens, 8\]"):
        batch_topk_encode(inputs[0][None], *inputs[1:], 3)
