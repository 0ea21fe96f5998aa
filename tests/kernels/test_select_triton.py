"""The selection kernel and the loop around it: on a GPU as compiled, without one in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from encode_oracle import exact_inputs, preactivations, random_inputs, topk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qscope_posttrain.kernels import certified, topk_encode
from qscope_posttrain.kernels.select import topk_product

SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-40, -1e-40, 2.0, 3.0, -1.0]


@pytest.mark.promise("Triton kernels give what torch gives, in Triton's interpreter")
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(1, 40), st.integers(12, 60), st.integers(0, 99), st.booleans())
def test_selection_is_a_stable_sort(
    triton_device: torch.device, n: int, k: int, tile: int, seed: int, double: bool
) -> None:
    from qscope_posttrain.kernels.triton.select import merge_

    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if double else torch.float32
    kinds = torch.tensor(SPECIAL[: [11, 4, 8, 2][seed % 4]], dtype=wide)
    pre = kinds[torch.randint(len(kinds), (2, n), generator=generator)].to(triton_device)
    k = min(k, n)
    values = torch.empty(2, k, device=triton_device, dtype=wide)
    indices = torch.empty(2, k, device=triton_device, dtype=torch.int32)
    for start in range(0, n, tile):
        merge_(values, indices, min(k, start), pre[:, start : start + tile], start)
    expected = topk(pre, k, relu=False)
    order = expected[1].sort(dim=1)
    assert torch.equal(indices.long(), order.values), "in the order of their indices"
    torch.testing.assert_close(values, expected[0].gather(1, order.indices), rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d_sae", "k", "features"), [(50, 50, 50), (200, 50, 64), (130, 7, 33), (20, 1, None)])
def test_the_loop_with_the_kernel(
    triton_device: torch.device, dtype: torch.dtype, d_sae: int, k: int, features: int | None
) -> None:
    inputs = tuple(tensor.to(triton_device) for tensor in exact_inputs(5, 20, d_sae, dtype))
    values, indices = topk_product(*inputs, k, dtype, tile_tokens=3, tile_features=features, triton=True)
    expected = topk(preactivations(*inputs), k, relu=False)
    assert torch.equal(values.double(), expected[0])
    assert torch.equal(indices.long(), expected[1])


def test_wide_tiles_are_launched_in_pieces(triton_device: torch.device) -> None:
    from qscope_posttrain.kernels.triton.select import BLOCK, merge_

    pre = torch.randn(1, BLOCK + 500).to(triton_device)
    pre[0, -1] = 100
    values = torch.empty(1, 3, device=triton_device)
    indices = torch.empty(1, 3, device=triton_device, dtype=torch.int32)
    bias = torch.zeros(BLOCK + 500, device=triton_device)
    bias[-2] = 200
    merge_(values, indices, 0, pre, 7, bias)
    expected = topk(pre + bias, 3, relu=False)[1].sort(dim=1).values + 7
    assert torch.equal(indices.long(), expected)


@pytest.mark.promise("Triton kernels on a GPU")
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["model", "fp32", "certified"])
def test_on_cuda_as_on_the_cpu(dtype: torch.dtype, precision: str) -> None:
    inputs = random_inputs(300, 200, 20_000, dtype)
    expected = topk_encode(*inputs, 50, precision="fp32")
    values, indices = topk_encode(*(tensor.cuda() for tensor in inputs), 50, precision=precision)
    torch.testing.assert_close(values.cpu(), expected[0], rtol=1e-4, atol=1e-4)
    assert (indices.cpu() == expected[1]).float().mean() > 0.999
    exact = exact_inputs(300, 24, 20_000, dtype)
    found = topk_encode(*(tensor.cuda() for tensor in exact), 50, precision=precision)
    assert torch.equal(found[1].cpu(), topk_encode(*exact, 50)[1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_synchronisation_on_cuda() -> None:
    inputs = [tensor.cuda().requires_grad_() for tensor in random_inputs(300, 64, 4000, torch.float32)]
    topk_encode(*inputs, 20)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        topk_encode(*inputs, 20)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_certified_products_do_not_synchronise_on_cuda() -> None:
    x, W_enc, b_enc = (tensor.cuda() for tensor in random_inputs(300, 64, 4000, torch.float32))
    indices = torch.randint(4000, (300, 100), dtype=torch.int32, device="cuda")
    first = torch.zeros(300, dtype=torch.int32, device="cuda")
    out = torch.empty(300, 100, device="cuda")
    certified.dot_products(out, x, W_enc, b_enc, indices, first, first + 50)
    torch.cuda.set_sync_debug_mode("error")
    try:
        certified.dot_products(out, x, W_enc, b_enc, indices, first, first + 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = (x @ W_enc.T + b_enc).gather(1, indices.long())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
