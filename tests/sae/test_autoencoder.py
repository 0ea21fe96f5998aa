from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_result import LargestResult
from torch import Tensor

from qscope_posttrain.sae.activations import TOP_K_VARIANTS, BatchTopK, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

MakeSAE = Callable[..., SparseAutoencoder]

ACTIVATIONS = [
    *(TopK(5, variant) for variant in TOP_K_VARIANTS),
    ReLU(),
    BatchTopK(1.0),
    JumpReLU(torch.linspace(0, 1, 64)),
]


def dense_code(sae: SparseAutoencoder, x: Tensor, **options: int) -> Tensor:
    values, indices = sae.encode(x, **options)
    return torch.zeros(x.shape[0], sae.d_sae, dtype=values.dtype).scatter_add(1, indices.long(), values)


@pytest.mark.parametrize("variant", TOP_K_VARIANTS)
def test_encode_and_decode_are_the_formulas(make_sae: MakeSAE, variant: str) -> None:
    sae = make_sae(activation=TopK(5, variant))
    x = torch.randn(30, sae.d_model)
    pre = x @ sae.W_enc.T + sae.b_enc
    kept = torch.zeros_like(pre).scatter(1, pre.topk(5).indices, pre.topk(5).values)
    expected = kept if variant == "signed" else kept.relu()
    values, indices = sae.encode(x)
    assert values.shape == indices.shape == (30, 5)
    assert indices.dtype == torch.int32
    torch.testing.assert_close(dense_code(sae, x), expected)
    torch.testing.assert_close(sae.decode(values, indices), expected @ sae.W_dec + sae.b_dec)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(1, 50), st.sampled_from(range(len(ACTIVATIONS))), st.integers(0, 1000))
def test_code_does_not_depend_on_the_tile(tokens: int, tile: int, which: int, seed: int) -> None:
    """Multiples of 1/64, so that every sum is exact, and no two latents of a token tie: the comparison is exact too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float()

    sae = SparseAutoencoder(draw(64, 6), torch.arange(64) / 64, draw(64, 6), draw(6), ACTIVATIONS[which])
    x = draw(tokens, 6)
    values, indices = sae.encode(x, tile_tokens=tile)
    whole_values, whole_indices = sae.encode(x, tile_tokens=1000)
    assert torch.equal(values, whole_values)
    assert torch.equal(indices[values > 0], whole_indices[whole_values > 0])
    assert torch.equal(sae.decode(values, indices), sae.decode(whole_values, whole_indices))


@pytest.mark.parametrize("gradient", [False, True])
def test_all_pre_activations_never_exist_at_once(make_sae: MakeSAE, gradient: bool) -> None:
    sae = make_sae(d_sae=512, d_model=8)
    x = torch.randn(300, 8, requires_grad=gradient)
    with LargestResult() as largest:
        values, _ = sae.encode(x, tile_tokens=20)
        if gradient:
            values.sum().backward()
    assert 20 * 512 <= largest.elements < 40 * 512, "one tile, not 300 x 512"


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: repr(a)[:24])
def test_encode_gradient_is_that_of_the_formula(make_sae: MakeSAE, activation) -> None:  # type: ignore[no-untyped-def]
    sae = make_sae(activation=activation)
    x = torch.randn(20, sae.d_model, requires_grad=True)
    weight = torch.randn(sae.d_sae)
    (dense_code(sae, x, tile_tokens=7) * weight).sum().backward()
    again = x.detach().clone().requires_grad_()
    pre = again @ sae.W_enc.T + sae.b_enc
    survives = dense_code(sae, x.detach()) != 0
    (pre * survives * weight).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_training_gradients_reach_the_encoder(make_sae: MakeSAE) -> None:
    sae = make_sae()
    trained = replace(sae, W_enc=sae.W_enc.clone().requires_grad_(), b_enc=sae.b_enc.clone().requires_grad_())
    x = torch.randn(20, sae.d_model)
    values, indices = trained.encode(x)
    values.square().sum().backward()
    again = replace(sae, W_enc=sae.W_enc.clone().requires_grad_(), b_enc=sae.b_enc.clone().requires_grad_())
    (x @ again.W_enc.T + again.b_enc).gather(1, indices.long()).relu().square().sum().backward()
    torch.testing.assert_close(trained.W_enc.grad, again.W_enc.grad)
    torch.testing.assert_close(trained.b_enc.grad, again.b_enc.grad)


def test_precision(make_sae: MakeSAE) -> None:
    sae = make_sae().to(dtype=torch.bfloat16)
    x = torch.randn(20, sae.d_model)
    exact = sae.to(dtype=torch.float32).encode(x)
    for precision in ("fp32", "certified"):
        values, indices = sae.encode(x, precision=precision)
        assert torch.equal(indices, exact[1])
        torch.testing.assert_close(values, exact[0])
    with pytest.raises(ValueError, match="precision='certified' is for TopK"):
        make_sae(activation=ReLU()).encode(x, precision="certified")


def test_decode_gradient(make_sae: MakeSAE) -> None:
    sae = make_sae().to(dtype=torch.float64)
    indices = torch.randint(0, sae.d_sae, (6, 4), dtype=torch.int32)
    values = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: sae.decode(v, indices), (values,))
    W_dec = sae.W_dec.clone().requires_grad_()
    trained = replace(sae, W_dec=W_dec)
    trained.decode(values, indices).sum().backward()
    expected = torch.zeros(sae.d_sae, dtype=torch.float64).index_add(0, indices.long().flatten(), values.flatten())
    torch.testing.assert_close(W_dec.grad, expected[:, None].expand_as(W_dec).detach())


def test_pre_activations(make_sae: MakeSAE) -> None:
    sae = make_sae()
    x = torch.randn(9, sae.d_model, requires_grad=True)
    everything = sae.pre_activations(x)
    torch.testing.assert_close(everything, x @ sae.W_enc.T + sae.b_enc)
    some = sae.pre_activations(x, [40, 3, 3])
    torch.testing.assert_close(some, everything[:, [40, 3, 3]])
    some.sum().backward()
    torch.testing.assert_close(x.grad, sae.W_enc[[40, 3, 3]].sum(0).expand(9, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_input_is_encoded_in_the_dtype_of_the_sae(make_sae: MakeSAE, dtype: torch.dtype) -> None:
    sae = make_sae()
    x = torch.randn(5, sae.d_model).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, indices = sae.encode(x)
        x_hat = sae.decode(values, indices)
        pre = sae.pre_activations(x, [1])
    assert values.dtype == x_hat.dtype == pre.dtype == torch.float32
    torch.testing.assert_close(values, sae.encode(x.float())[0], rtol=0, atol=0)


def test_half_precision_sae(make_sae: MakeSAE) -> None:
    sae = make_sae()
    half = sae.to(dtype=torch.bfloat16)
    x = torch.randn(5, sae.d_model)
    values, indices = half.encode(x)
    assert values.dtype == half.pre_activations(x).dtype == torch.float32
    assert half.decode(values, indices).dtype == torch.bfloat16
    assert sae.to(dtype=torch.float32) is sae
    with pytest.raises(ValueError, match="W_enc holds NaN or infinite"):
        replace(sae, W_enc=sae.W_enc * 1e6).to(dtype=torch.float16)


def test_no_tokens_and_nothing_firing(make_sae: MakeSAE) -> None:
    sae = make_sae(activation=BatchTopK(1e6))
    values, indices = sae.encode(torch.randn(3, sae.d_model))
    assert values.shape == indices.shape == (3, 0)
    assert torch.equal(sae.decode(values, indices), sae.b_dec.expand(3, -1))
    values, indices = make_sae().encode(torch.randn(0, sae.d_model))
    assert values.shape == (0, 4)
    assert sae.decode(values, indices).shape == (0, sae.d_model)


def test_select_copies_rows(make_sae: MakeSAE) -> None:
    sae = make_sae()
    rows = sae.select(torch.tensor([7, 2]))
    assert len(rows) == 2
    assert rows.layer == 3
    assert torch.equal(rows.encoder, sae.W_enc[[7, 2]])
    assert torch.equal(rows.encoder_bias, sae.b_enc[[7, 2]])
    assert torch.equal(rows.decoder, sae.W_dec[[7, 2]])
    rows.decoder.zero_()
    assert sae.W_dec[7].abs().sum() > 0


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        ([64], ValueError, r"\[64\] are out of range.*0\.\.63"),
        ([-1, 3], ValueError, r"\[-1\] are out of range"),
        ([], ValueError, "non-empty"),
        ([[1]], ValueError, "non-empty list"),
        ([1.0], TypeError, "integers"),
        ([True], TypeError, "integers"),
    ],
)
def test_bad_feature_ids(make_sae: MakeSAE, ids: list, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make_sae().select(ids)
    with pytest.raises(error, match=says):
        make_sae().pre_activations(torch.zeros(1, 16), ids)


def test_bad_inputs(make_sae: MakeSAE) -> None:
    sae = make_sae()
    with pytest.raises(ValueError, match=r"\[tokens, 16\] for this SAE, got \[2, 3, 16\]"):
        sae.encode(torch.zeros(2, 3, 16))
    with pytest.raises(ValueError, match=r"got \[2, 17\]"):
        sae.pre_activations(torch.zeros(2, 17))
    with pytest.raises(TypeError, match="floating"):
        sae.encode(torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="on meta, the SAE on cpu"):
        sae.encode(torch.zeros(2, 16, device="meta"))
    with pytest.raises(ValueError, match="tile_tokens"):
        sae.encode(torch.zeros(2, 16), tile_tokens=0)
    with pytest.raises(ValueError, match=r"indices must be \[2, 3\], got \[2, 4\]"):
        sae.decode(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match="int32 or int64"):
        sae.decode(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"W_enc": torch.zeros(16, 64)}, ValueError, r"W_enc has shape \[16, 64\], expected \[64, 16\]"),
        ({"W_dec": torch.zeros(64, 15)}, ValueError, r"W_dec has shape \[64, 15\], expected \[64, 16\]"),
        ({"b_enc": torch.zeros(0)}, ValueError, "b_enc has shape"),
        ({"b_enc": torch.zeros(64, dtype=torch.int32)}, ValueError, "b_enc has dtype int32"),
        ({"b_dec": [0.0] * 16}, TypeError, "b_dec must be a tensor, got list"),
        ({"b_dec": torch.zeros(16).half()}, ValueError, "share one dtype"),
        ({"b_dec": torch.full((16,), float("inf"))}, ValueError, "b_dec holds NaN or infinite values, first in row 0"),
        ({"activation": TopK(65)}, ValueError, "k=65.*only 64"),
        ({"activation": 4}, TypeError, "activation must be"),
    ],
)
def test_construction_checks(make_sae: MakeSAE, change: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        replace(make_sae(), **change)


def test_first_bad_row_is_named(make_sae: MakeSAE) -> None:
    W_dec = make_sae().W_dec.clone()
    W_dec[41, 3] = float("nan")
    with pytest.raises(ValueError, match="W_dec holds NaN or infinite values, first in row 41"):
        replace(make_sae(), W_dec=W_dec)


def test_repr_is_one_readable_line(make_sae: MakeSAE) -> None:
    text = repr(make_sae())
    assert text == "SparseAutoencoder(64 x 16, TopK(k=4, variant='relu_after'), layer 3, float32 on cpu, memory)"
