"""Attacks on the bound of `kernels.certified`: if it were too small, a row would be certified that is wrong."""

from __future__ import annotations

import pytest
import torch
from encode_oracle import preactivations, random_inputs, topk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qscope_posttrain.kernels import certified, certified_encode, certified_weights, topk_encode

ROUNDING = 2.0**-8 + 2.0**-16


def spread(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Vectors on which rounding does its worst."""
    normal = torch.randn(shape, generator=generator)
    if kind == "halfway":  # just below the middle between two bfloat16 numbers, all to the same side
        return torch.full(shape, 1 + 2.0**-8 - 2.0**-14) * torch.randn(shape[0], 1, generator=generator).sign()
    if kind == "either side":
        return 1 + 2.0**-8 + (2.0**-13) * normal.sign()
    if kind == "cancelling":
        return torch.cat([normal, -normal], dim=1)[:, : shape[1]] * 1e3 + 1e-3 * normal
    if kind == "denormal":
        return normal * 1e-39
    if kind == "wide":
        return normal * 10.0 ** torch.randint(-18, 18, shape, generator=generator).float()
    if kind == "few values":
        return normal.round()
    return normal * {"huge": 1e18, "small": 1e-18, "normal": 1.0}[kind]


KINDS = ["normal", "halfway", "either side", "cancelling", "denormal", "wide", "few values", "huge", "small"]


def attack(kind_x: str, kind_W: str, tokens: int, d_model: int, d_sae: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, W_enc = spread(kind_x, (tokens, d_model), generator), spread(kind_W, (d_sae, d_model), generator)
    scale = [0.0, 1.0, 1e-3, 1e6][seed % 4]
    return x, W_enc, torch.randn(d_sae, generator=generator) * scale


def float32_error(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """The largest error of any float32 evaluation of a row's pre-activations, [tokens, 1]."""
    sums = x.double().abs() @ W_enc.double().abs().T + b_enc.double().abs()
    return (sums.amax(dim=1, keepdim=True) + 1e-36) * (x.shape[1] + 2) * 2.0**-23


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(1, 90), st.integers(0, 10**6))
def test_the_bound_holds_for_every_product(kind_x: str, kind_W: str, d_model: int, seed: int) -> None:
    x, W_enc, b_enc = attack(kind_x, kind_W, 4, d_model, 60, seed)
    weights = certified_weights(W_enc, b_enc)
    low, indices = topk_encode(x.bfloat16(), weights.W_low, weights.b_low, 60, variant="signed")
    eps = certified.error_bound(x, weights.norms)[:, None]
    fp32, order = topk_encode(x, W_enc, b_enc, 60, variant="signed")
    for evaluated in (
        preactivations(x, W_enc, b_enc).gather(1, indices.long()),
        fp32.double().gather(1, order.argsort(dim=1)).gather(1, indices.long()),
    ):
        assert ((evaluated - low.double()).abs() <= low.double().abs() * ROUNDING + eps).logical_or(eps.isinf()).all()


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.integers(1, 70),
    st.sampled_from([40, 300]),
    st.integers(0, 10**6),
)
def test_nothing_larger_is_left_out(kind_x: str, kind_W: str, d_model: int, d_sae: int, seed: int) -> None:
    x, W_enc, b_enc = attack(kind_x, kind_W, 5, d_model, d_sae, seed)
    values, indices = certified_encode(x, W_enc, b_enc, 10, variant="signed")[:2]
    exact = preactivations(x, W_enc, b_enc)
    kept = exact.gather(1, indices.long())
    left = exact.scatter(1, indices.long(), -torch.inf).amax(dim=1, keepdim=True)
    error = float32_error(x, W_enc, b_enc)
    assert (left <= kept.amin(dim=1, keepdim=True) + 2 * error).all()
    assert ((values - kept).abs() <= error).all()


def test_the_bound_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors as large as Cauchy-Schwarz allows: every fourth feature is the larger, and is rounded down the most."""
    W_enc, b_enc = torch.full((400, 64), 1 + 2.0**-12), torch.zeros(400)  # 64.016, in bfloat16 64
    W_enc[::4], b_enc[::4] = 1 + 2.0**-8 - 2.0**-15, -3 / 16  # 64.06, in bfloat16 63.75
    x = torch.ones(3, 64)
    expected = topk(preactivations(x, W_enc, b_enc), 20)[1]
    assert expected[0].tolist() == list(range(0, 80, 4))
    assert (topk_encode(x, W_enc.bfloat16(), b_enc.bfloat16(), 20)[1] % 4 != 0).all()
    result = certified_encode(x, W_enc, b_enc, 20)
    assert torch.equal(result.indices.long(), expected)
    assert result.recomputed == 3
    monkeypatch.setattr(certified, "error_bound", lambda x, norms: x.new_zeros(len(x), dtype=torch.float64))
    monkeypatch.setattr(certified, "_ROUNDING", 0.0)
    result = certified_encode(x, W_enc, b_enc, 20)
    assert result.recomputed == 0
    assert (result.indices % 4 != 0).all(), "a bound that is too small certifies wrong rows"


def test_the_bound_is_not_vacuous() -> None:
    """Within a factor 12 of the largest error that occurs, and all random rows are certified."""
    x, W_enc, b_enc = random_inputs(40, 512, 8000, torch.float32)
    weights = certified_weights(W_enc, b_enc)
    low, indices = topk_encode(x.bfloat16(), weights.W_low, weights.b_low, 50, variant="signed")
    exact = preactivations(x, W_enc, b_enc).gather(1, indices.long())
    bound = low.double().abs() * ROUNDING + certified.error_bound(x, weights.norms)[:, None]
    assert 1 < (bound.amax() / (exact - low).abs().amax()) < 12
    for k in (1, 50, 100):
        result = certified_encode(x, W_enc, b_enc, k, weights=weights)
        values, order = topk_encode(x, W_enc, b_enc, k, precision="fp32")
        assert result.recomputed.ndim == 0
        assert result.recomputed == 0
        assert torch.equal(result.indices, order)
        torch.testing.assert_close(result.values, values, rtol=1e-5, atol=1e-6)


def test_only_rows_that_fail_are_recomputed() -> None:
    x, W_enc, b_enc = random_inputs(20, 64, 3000, torch.float32)
    x[3] = torch.nan
    x[7, 0] = torch.inf
    x[11] = 1e38
    x[15] = 0
    result = certified_encode(x, W_enc, b_enc, 20)
    plain = topk_encode(x, W_enc, b_enc, 20)
    clean = [row for row in range(20) if row not in (3, 7, 11)]
    assert torch.equal(result.indices[clean], plain[1][clean])
    assert 3 <= result.recomputed < 20
    assert result.values[3].isnan().all()
    assert result.indices[3].tolist() == list(range(20))


def test_exact_ties_go_to_the_lowest_index() -> None:
    result = certified_encode(torch.ones(4, 8), torch.ones(500, 8), torch.zeros(500), 7)
    assert result.recomputed == 4
    assert result.indices.eq(torch.arange(7)).all()
    assert result.values.eq(8).all()


def test_half_precision_weights_are_their_own_copy() -> None:
    x, W_enc, b_enc = random_inputs(20, 64, 2000, torch.bfloat16)
    weights = certified_weights(W_enc, b_enc)
    assert weights.W_low is W_enc
    assert weights.norms[1] == weights.norms[3] == 0
    result = certified_encode(x, W_enc, b_enc, 30, weights=weights)
    values, indices = topk_encode(x, W_enc, b_enc, 30, precision="fp32")
    assert torch.equal(result.indices, indices)
    torch.testing.assert_close(result.values, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, W_enc, b_enc = (tensor.requires_grad_() for tensor in random_inputs(4, 8, 40, dtype))
    weights = certified_weights(W_enc.detach(), b_enc.detach())
    op = torch.ops.qscope_posttrain.topk_encode_certified.default
    torch.library.opcheck(op, (x, W_enc, b_enc, *weights, 5, True, 3, 9))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    x, W_enc, b_enc = random_inputs(tokens, 16, 400, torch.float32)
    result = certified_encode(x, W_enc, b_enc, 3)
    assert result.values.shape == result.indices.shape == (tokens, 3)
    assert result.recomputed == 0


def test_bad_input() -> None:
    x, W_enc, b_enc = random_inputs(4, 8, 40, torch.float32)
    with pytest.raises(ValueError, match="certified results are float32: for float64 weights use precision='fp32'"):
        certified_encode(x, W_enc.double(), b_enc.double(), 3)
    weights = certified_weights(W_enc, b_enc)
    with pytest.raises(ValueError, match=r"weights\.W_low must be \[40, 8\], got \[39, 8\]"):
        certified_encode(x, W_enc, b_enc, 3, weights=weights._replace(W_low=weights.W_low[:39]))
    with pytest.raises(TypeError, match=r"weights\.norms must be torch\.float64"):
        certified_encode(x, W_enc, b_enc, 3, weights=weights._replace(norms=weights.norms.float()))
    with pytest.raises(ValueError, match="only 40"):
        certified_encode(x, W_enc, b_enc, 41)
