"""The selection in C is that of plain torch, to the bit."""

from __future__ import annotations

import pytest
import torch
from encode_oracle import random_inputs, topk
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope_posttrain.kernels import certified, certified_encode, native, select, topk_encode

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")

SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-39, -1e-39, 2.0, 3.0, -1.0]


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 5),
    st.integers(1, 2000),
    st.integers(1, 200),
    st.integers(1, 999),
    st.integers(0, 999),
    st.booleans(),
)
def test_selection_is_that_of_torch(rows: int, n: int, k: int, tile: int, seed: int, bfloat16: bool) -> None:
    """Tiles of more than 256 elements take a first threshold from the maxima of their parts, if k is small enough."""
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(rows, n, generator=generator)
    if seed % 5:
        kinds = torch.tensor(SPECIAL[: [11, 4, 8, 2][seed % 4]])
        some = torch.rand(rows, n, generator=generator) < [0.01, 0.3, 1.0][seed % 3]
        pre = torch.where(some, kinds[torch.randint(len(kinds), (rows, n), generator=generator)], pre)
    pre = pre.bfloat16() if bfloat16 else pre
    k = min(k, n)
    results = []
    for merge_ in (native.merge_, select.merge_):
        values, indices = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int32)
        for start in range(0, n, tile):
            merge_(values, indices, min(k, start), pre[:, start : start + tile].contiguous(), start)
        results.append((values.nan_to_num(nan=7.0), indices))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1].long(), topk(pre.float(), k)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [300, 3000])
def test_negative_zero_is_zero_also_at_the_first_threshold(dtype: torch.dtype, n: int) -> None:
    pre = torch.zeros(1, n, dtype=dtype)
    pre[0, ::2] = -0.0
    values, indices = torch.empty(1, 5), torch.empty(1, 5, dtype=torch.int32)
    native.merge_(values, indices, 0, pre, 0)
    assert indices.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min, torch.inf, torch.nan, 0.0, -1e-39])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [5000, 600])
def test_rows_of_one_value(fill: float, dtype: torch.dtype, n: int) -> None:
    pre = torch.full((2, n), fill).to(dtype)
    pre[1, ::700] = 1
    values, indices = torch.empty(2, 60), torch.empty(2, 60, dtype=torch.int32)
    native.merge_(values, indices, 0, pre, 0)
    expected = topk(pre.float(), 60, relu=False)
    assert torch.equal(indices.long(), expected[1])
    torch.testing.assert_close(values, expected[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_model", [1, 63, 64, 200])
def test_dot_products_stay_in_their_range(dtype: torch.dtype, d_model: int) -> None:
    x, W_enc, b_enc = random_inputs(9, d_model, 40, dtype)
    indices = torch.randint(40, (9, 12), dtype=torch.int32)
    first, last = torch.arange(9, dtype=torch.int32) % 4, torch.arange(9, dtype=torch.int32) + 2
    out = torch.full((9, 12), 99.0)
    native.dot_products(out, x.float(), W_enc, b_enc, indices, first, last)
    place = torch.arange(12)
    inside = (place >= first[:, None]) & (place < last[:, None])
    exact = (x.double() @ W_enc.double().T + b_enc.double()).gather(1, indices.long())
    torch.testing.assert_close(out.double(), exact.where(inside, 99.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switched_off_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    inputs = random_inputs(30, 64, 4000, dtype)
    with_c = topk_encode(*inputs, 50), certified_encode(*inputs, 50)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = topk_encode(*inputs, 50)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("QSCOPE_NATIVE", "0")
    assert not native.enabled()
    plain = topk_encode(*inputs, 50), certified_encode(*inputs, 50)
    assert torch.equal(with_c[0][0], plain[0][0])
    assert torch.equal(with_c[0][1], plain[0][1])
    assert torch.equal(with_c[1].indices, plain[1].indices)
    torch.testing.assert_close(with_c[1].values, plain[1].values)
    torch.testing.assert_close(threaded[0], plain[0][0], rtol=1e-2, atol=1e-2)


def test_without_a_compiler_torch_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for broken in ("no-such-compiler", "false"):
        monkeypatch.setenv("CC", broken)
        native.library.cache_clear()
        assert native.library() is None
        topk_encode(*random_inputs(3, 8, 90, torch.float32), 5)
    native.library.cache_clear()
    assert certified.native is native
