"""Promises on precision under both of torch's ways to lower fp32 matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from encode_oracle import random_inputs
from transformers.utils import enable_tf32

from qscope_posttrain.kernels import feature_penalty, feature_preactivations, threshold_encode, topk_encode
from qscope_posttrain.kernels.checks import exact_dtype, lowered_to

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def by_transformers() -> None:
    enable_tf32.cache_clear()
    enable_tf32(True)


def by_backend() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


LOWER: dict[str, Callable[[], None]] = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "transformers": by_transformers,
    "backend": by_backend,
}


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    def default() -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
        enable_tf32.cache_clear()

    default()
    yield
    default()


def test_both_interfaces_are_read() -> None:
    assert lowered_to(CPU) is lowered_to(CUDA) is None
    torch.set_float32_matmul_precision("medium")
    assert (lowered_to(CPU), lowered_to(CUDA)) == ("bf16", "tf32")
    torch.set_float32_matmul_precision("highest")
    assert lowered_to(CPU) is lowered_to(CUDA) is None


def test_the_newer_interface_is_read() -> None:
    torch.backends.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    assert lowered_to(CPU) == lowered_to(CUDA) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert lowered_to(CUDA) is None
    assert exact_dtype(torch.float32, CUDA) == torch.float32
    assert exact_dtype(torch.float32, CPU) == torch.float64
    assert exact_dtype(torch.bfloat16, CPU) == torch.bfloat16


@pytest.mark.parametrize("how", LOWER)
def test_float32_encoders_say_what_lowered_them(how: str) -> None:
    x, W_enc, b_enc = random_inputs(4, 8, 40, torch.float32)
    LOWER[how]()
    for precision in ("fp32", "certified"):
        with pytest.raises(ValueError, match=r"on cpu are lowered to .*tf32=True.*precision='model'"):
            topk_encode(x, W_enc, b_enc, 3, precision=precision)
    with pytest.raises(ValueError, match="lowered"):
        threshold_encode(x, W_enc, b_enc, precision="fp32")
    assert topk_encode(x, W_enc, b_enc, 3)[0].shape == (4, 3)
    assert topk_encode(x, W_enc.double(), b_enc.double(), 3, precision="fp32")[0].dtype == torch.float64


@pytest.mark.parametrize("how", LOWER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 4, 300])
def test_readouts_stay_at_fp32(how: str, dtype: torch.dtype, features: int) -> None:
    """Where the processor multiplies in bf16, this was wrong by 0.3."""
    x = torch.randn(1030, 512).to(dtype).requires_grad_()
    rows, bias = torch.randn(features, 512).requires_grad_(), torch.randn(features).requires_grad_()
    LOWER[how]()
    found = feature_preactivations(x, rows, bias)
    gradient = torch.randn(found.shape)
    back = torch.autograd.grad(found, (x, rows, bias), gradient)
    wide, exact = x.detach().double(), gradient.double()
    expected = wide @ rows.detach().double().T + bias.detach().double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(back[0].double(), exact @ rows.detach().double(), rtol=rounding, atol=1e-4)
    torch.testing.assert_close(back[1].double(), exact.T @ wide, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("how", LOWER)
def test_the_penalty_stays_at_fp32(how: str) -> None:
    x = torch.randn(1030, 512, requires_grad=True)
    rows, zero = torch.randn(3, 512) / 512**0.5, torch.zeros(3)
    counted = torch.rand(1030) > 0.2
    LOWER[how]()
    found = feature_penalty(x, rows, zero, zero, counted).sums
    (back,) = torch.autograd.grad(found.sum(), x)
    factor = counted.double()
    pre = x.detach().double() @ rows.double().T
    torch.testing.assert_close(found.double(), (pre.relu() * factor[:, None]).sum(0), rtol=1e-5, atol=1e-5)
    clear = (pre.abs() > 1e-4).all(1)
    expected = (pre > 0).double() @ rows.double() * factor[:, None]
    torch.testing.assert_close(back.double()[clear], expected[clear], rtol=1e-5, atol=1e-6)
