from __future__ import annotations

import itertools

import pytest
import torch
from encode_oracle import dense, exact_inputs, preactivations, random_inputs, topk
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_result import LargestResult
from torch import Tensor

from qscope_posttrain.kernels import topk_encode
from qscope_posttrain.kernels.encode import VARIANTS
from qscope_posttrain.kernels.select import best, merge_, order_keys

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["model", "fp32", "certified"])
@pytest.mark.parametrize(
    ("tokens", "d_model", "d_sae", "k", "tiles"),
    [
        (7, 20, 60, 1, (None, None)),
        (7, 20, 60, 60, (3, 7)),
        (5, 33, 1000, 50, (2, 999)),
        (3, 80, 4001, 100, (None, 3000)),
        (0, 20, 60, 4, (None, None)),
    ],
)
def test_exact_products_are_encoded_exactly(
    tokens: int, d_model: int, d_sae: int, k: int, tiles: tuple, dtype: torch.dtype, precision: str
) -> None:
    """Small integers: ties everywhere, in every row, within and across tiles."""
    if dtype == torch.float64 and precision == "certified":
        pytest.skip("certified results are float32")
    x, W_enc, b_enc = exact_inputs(tokens, d_model, d_sae, dtype)
    options = {"precision": precision, "tile_tokens": tiles[0], "tile_features": tiles[1]}
    for variant in VARIANTS:
        values, indices = topk_encode(x, W_enc, b_enc, k, variant=variant, **options)
        expected = topk(preactivations(x, W_enc, b_enc), k, relu=variant != "signed")
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert indices.dtype == torch.int32
        assert torch.equal(values.double(), expected[0])
        assert torch.equal(indices.long(), expected[1])


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_sae", "k"), [(48, 500, 1), (100, 3000, 50), (100, 5000, 100)])
def test_random_products_agree_with_float64(dtype: torch.dtype, d_model: int, d_sae: int, k: int) -> None:
    x, W_enc, b_enc = random_inputs(20, d_model, d_sae, dtype)
    pre = preactivations(x, W_enc, b_enc)
    for precision in ("model", "fp32"):
        values, indices = topk_encode(x, W_enc, b_enc, k, precision=precision)
        limit = TOLERANCE[dtype if precision == "model" else torch.promote_types(dtype, torch.float32)]
        torch.testing.assert_close(values.double(), pre.gather(1, indices.long()).relu(), rtol=limit, atol=limit)
        torch.testing.assert_close(values.double(), topk(pre, k)[0], rtol=limit, atol=limit)
        assert indices.sort(dim=1).values.diff(dim=1).gt(0).all(), "distinct"


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 900), st.integers(1, 60), st.integers(1, 300), st.integers(0, 99), st.booleans()
)
def test_selection_is_a_stable_sort(rows: int, n: int, k: int, tile: int, seed: int, bfloat16: bool) -> None:
    """Few distinct values, infinities, both zeros, denormals and NaN, in tiles of any size."""
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-40, -1e-40, 2.0, 3.0, -1.0])
    generator = torch.Generator().manual_seed(seed)
    kinds = special[: [11, 4, 8, 2][seed % 4]]
    pre = kinds[torch.randint(len(kinds), (rows, n), generator=generator)]
    pre = pre.bfloat16() if bfloat16 else pre
    k = min(k, n)
    values, indices = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int32)
    for start in range(0, n, tile):
        merge_(values, indices, min(k, start), pre[:, start : start + tile], start)
    expected = topk(pre.float(), k, relu=False)
    assert torch.equal(indices.long(), expected[1])
    torch.testing.assert_close(values, expected[0], rtol=0, atol=0, equal_nan=True)


def test_rows_with_many_ties_at_the_boundary_are_done_again() -> None:
    """More elements tie than are looked at, in one row of three."""
    pre = torch.randn(3, 4000)
    pre[1] = pre[1].clamp(max=0.5)
    values, indices = best(pre, torch.arange(4000).expand(3, 4000), 20)
    expected = topk(pre, 20, relu=False)
    assert torch.equal(indices, expected[1])
    assert torch.equal(values, expected[0])


def test_keys_hold_the_order_of_all_floats() -> None:
    ladder = [-torch.inf, -3e38, -1.0, -1e-40, 0.0, 1e-40, 1.0, 3e38, torch.inf, torch.nan]
    keys = order_keys(torch.tensor(ladder), torch.full((len(ladder),), 7))
    assert keys.diff().gt(0).all()
    assert order_keys(torch.tensor(0.0), torch.tensor(3)) == order_keys(torch.tensor(-0.0), torch.tensor(3))
    assert order_keys(torch.tensor(torch.nan), torch.tensor(3)) == order_keys(-torch.tensor(torch.nan), torch.tensor(3))
    assert order_keys(torch.tensor(1.0), torch.tensor(3)) > order_keys(torch.tensor(1.0), torch.tensor(4))


@pytest.mark.parametrize("precision", ["model", "fp32", "certified"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_rows_change_no_other_row(precision: str, dtype: torch.dtype) -> None:
    x, W_enc, b_enc = random_inputs(6, 32, 3000, dtype)
    values, indices = topk_encode(x, W_enc, b_enc, 20, precision=precision)
    dirty = x.clone()
    dirty[1, 3], dirty[4] = torch.nan, torch.inf
    again, where = topk_encode(dirty, W_enc, b_enc, 20, precision=precision)
    clean = [0, 2, 3, 5]
    torch.testing.assert_close(again[clean], values[clean], rtol=1e-6, atol=1e-6)
    assert torch.equal(where[clean], indices[clean])
    assert again[[1, 4]].isnan().all()
    assert where[1].tolist() == list(range(20))


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tiles", [(None, None), (3, 5)])
def test_gradcheck(variant: str, tiles: tuple) -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs(5, 4, 12, torch.float64)]

    def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        return topk_encode(x, W_enc, b_enc, 8, variant=variant, tile_tokens=tiles[0], tile_features=tiles[1])[0]

    assert torch.autograd.gradcheck(encode, inputs)
    for some in itertools.product([False, True], repeat=3):
        if any(some):
            assert torch.autograd.gradcheck(
                encode, [t.detach().requires_grad_(s) for t, s in zip(inputs, some, strict=True)]
            )


@pytest.mark.parametrize("precision", ["model", "fp32", "certified"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_formula(precision: str, dtype: torch.dtype) -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs(9, 24, 700, dtype)]
    weight = torch.randn(9, 700, dtype=torch.float64)
    values, indices = topk_encode(*inputs, 6, precision=precision)
    (values * weight.gather(1, indices.long())).sum().backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    (preactivations(*wide) * weight * dense(torch.ones_like(values), indices, 700)).sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for narrow, exact in zip(inputs, wide, strict=True):
        assert narrow.grad.dtype == dtype
        torch.testing.assert_close(narrow.grad.double(), exact.grad, rtol=limit, atol=limit)


def test_backward_is_deterministic() -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs(64, 24, 200, torch.float32)]
    first, second = (torch.autograd.grad(topk_encode(*inputs, 20)[0].square().sum(), inputs) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_neither_direction_makes_a_large_tensor() -> None:
    tokens, d_model, d_sae, k = 400, 32, 1024, 8
    inputs = [tensor.requires_grad_() for tensor in random_inputs(tokens, d_model, d_sae, torch.float32)]
    with LargestResult() as largest:
        topk_encode(*inputs, k, tile_tokens=50, tile_features=256)[0].sum().backward()
    assert 50 * 256 <= largest.elements < min(tokens * d_sae, tokens * k * d_model) / 2


def test_strides_dtype_of_x_and_autocast_do_not_matter() -> None:
    x, W_enc, b_enc = random_inputs(12, 32, 600, torch.float32)
    values, indices = topk_encode(x, W_enc, b_enc, 9)
    strided = torch.stack([x, torch.zeros_like(x)], dim=2)[:, :, 0]
    transposed = W_enc.T.contiguous().T
    assert not strided.is_contiguous()
    assert not transposed.is_contiguous()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = topk_encode(strided, transposed, b_enc, 9)
        wide = topk_encode(x.double(), W_enc, b_enc, 9)
        backward_x = x.clone().requires_grad_()
        topk_encode(backward_x, W_enc, b_enc, 9)[0].sum().backward()
    torch.testing.assert_close(again[0], values)
    assert torch.equal(again[1], indices)
    assert torch.equal(wide[0], values)
    torch.testing.assert_close(backward_x.grad, dense(torch.ones(12, 9), indices, 600).mul(1.0) @ W_enc)


@pytest.mark.promise("Operators agree with float64 over dtypes and shapes, and pass opcheck and gradcheck")
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x, W_enc, b_enc = (tensor.requires_grad_() for tensor in random_inputs(5, 8, 30, dtype))
    op = torch.ops.qscope_posttrain.topk_encode.default
    for fp32, relu, tiles in ((False, True, (None, None)), (True, False, (2, 7))):
        torch.library.opcheck(op, (x, W_enc, b_enc, 4, fp32, relu, *tiles), atol=1e-4, rtol=1e-4)


@pytest.mark.promise("Operators compile without a graph break")
def test_compiles_without_a_graph_break() -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs(6, 8, 40, torch.float32)]
    for precision in ("model", "certified"):

        def loss(x: Tensor, W_enc: Tensor, b_enc: Tensor, precision: str = precision) -> Tensor:
            values, indices = topk_encode(x, W_enc, b_enc, 5, precision=precision)
            return (values * indices).sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
        for left, right in zip(
            torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
        ):
            torch.testing.assert_close(left, right)


def call(**change: object) -> tuple[Tensor, Tensor]:
    arguments: dict = {"x": torch.zeros(3, 8), "W_enc": torch.zeros(20, 8), "b_enc": torch.zeros(20), "k": 4}
    return topk_encode(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(2, 3, 8)}, ValueError, r"x must be \[tokens, 8\], got \[2, 3, 8\]"),
        ({"x": torch.zeros(3, 9)}, ValueError, r"x must be \[tokens, 8\], got \[3, 9\]"),
        ({"x": torch.zeros(3, 8, dtype=torch.int32)}, TypeError, "x must be float16.*got torch.int32"),
        ({"x": torch.zeros(3, 8, device="meta")}, ValueError, "W_enc is on cpu, x on meta"),
        ({"b_enc": torch.zeros(19)}, ValueError, r"b_enc must be \[20\], got \[19\]"),
        ({"b_enc": torch.zeros(20).bfloat16()}, TypeError, "b_enc is torch.bfloat16, W_enc is torch.float32"),
        ({"W_enc": torch.zeros(20)}, ValueError, r"W_enc must be \[d_sae, d_model\], got \[20\]"),
        ({"k": 21}, ValueError, "k=21 features.*only 20"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k must be an integer, got 2.0"),
        ({"k": True}, TypeError, "k must be an integer"),
        ({"W_enc": torch.zeros(0, 8), "b_enc": torch.zeros(0)}, ValueError, "only 0"),
        ({"precision": "exact"}, ValueError, "unknown precision 'exact'; choose one of model, fp32, certified"),
        ({"variant": "relu"}, ValueError, "unknown variant 'relu'; choose one of relu_after, relu_before, signed"),
        ({"tile_tokens": 0}, ValueError, "tile_tokens must be at least 1, got 0"),
        ({"tile_features": 1.5}, TypeError, "tile_features must be an integer"),
        ({"weights": (1, 2)}, ValueError, "weights belong to precision='certified', got precision='model'"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(**change)
