from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qscope_posttrain.sae.activations import (
    TOP_K_VARIANTS,
    Activation,
    BatchTopK,
    JumpReLU,
    ReLU,
    TopK,
    activation_from_spec,
    activation_to_spec,
)


def encode(activation: Activation, pre: Tensor) -> tuple[Tensor, Tensor]:
    """The identity for an encoder, so that `pre` are the pre-activations."""
    n = pre.shape[1]
    return activation.encode(pre, torch.eye(n), torch.zeros(n))


def dense(activation: Activation, pre: Tensor) -> Tensor:
    values, indices = encode(activation, pre)
    return torch.zeros_like(pre).scatter_add(1, indices.long(), values)


@given(st.integers(0, 2**16), st.integers(1, 12))
def test_variants_agree_where_at_least_k_are_positive(seed: int, k: int) -> None:
    pre = torch.randn(32, 40, generator=torch.Generator().manual_seed(seed))
    pre[:, :k] = pre[:, :k].abs() + 0.1
    pre = pre[:, torch.randperm(40)]
    codes = [dense(TopK(k, variant), pre) for variant in TOP_K_VARIANTS]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])
    assert (codes[0] > 0).sum(dim=1).eq(k).all()


def test_variants_where_fewer_than_k_are_positive() -> None:
    pre = torch.tensor([[3.0, -1.0, -2.0, 1.0, -4.0]])
    assert dense(TopK(4, "signed"), pre).tolist() == [[3.0, -1.0, -2.0, 1.0, 0.0]]
    for variant in ("relu_after", "relu_before"):
        assert dense(TopK(4, variant), pre).tolist() == [[3.0, 0.0, 0.0, 1.0, 0.0]]
        values, _ = encode(TopK(4, variant), pre)
        assert values.shape == (1, 4)
        assert (values > 0).sum() == 2, "zero-valued survivors fill the rectangle, they do not fire"


@pytest.mark.parametrize("variant", TOP_K_VARIANTS)
def test_encode_only_reads_its_input(variant: str) -> None:
    pre = torch.randn(8, 20)
    before = pre.clone()
    encode(TopK(3, variant), pre)
    assert torch.equal(pre, before)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (ReLU(), [[3.0, 0.0, 0.0, 1.0], [0.0, 0.5, 2.0, 0.25]]),
        (BatchTopK(0.5), [[3.0, 0.0, 0.0, 1.0], [0.0, 0.0, 2.0, 0.0]]),
        (BatchTopK(-1.5), [[3.0, 0.0, 0.0, 1.0], [0.0, 0.5, 2.0, 0.25]]),
        (JumpReLU(torch.tensor([4.0, 0.0, 2.0, 0.5])), [[0.0, 0.0, 0.0, 1.0], [0.0, 0.5, 0.0, 0.0]]),
    ],
    ids=["relu", "batchtopk", "batchtopk-negative-threshold", "jumprelu"],
)
def test_threshold_activations(activation: Activation, expected: list[list[float]]) -> None:
    pre = torch.tensor([[3.0, -1.0, 0.0, 1.0], [-2.0, 0.5, 2.0, 0.25]])
    assert dense(activation, pre).tolist() == expected


def test_threshold_activation_is_as_wide_as_the_widest_token() -> None:
    values, indices = encode(ReLU(), torch.tensor([[1.0, -1.0, -1.0], [1.0, 2.0, -1.0]]))
    assert values.tolist() == [[1.0, 0.0], [2.0, 1.0]]
    assert indices.shape == (2, 2)
    values, _ = encode(ReLU(), -torch.ones(2, 3))
    assert values.shape == (2, 0)


@pytest.mark.parametrize("activation", [TopK(2), TopK(2, "signed"), TopK(2, "relu_before"), ReLU(), BatchTopK(0.1)])
def test_gradient_reaches_survivors_only(activation: Activation) -> None:
    pre = torch.tensor([[3.0, -1.0, 2.0, 1.0]], requires_grad=True)
    encode(activation, pre)[0].sum().backward()
    fires = dense(activation, pre.detach()) > 0
    assert pre.grad is not None
    assert torch.equal(pre.grad, fires.float())


@pytest.mark.parametrize(
    "activation", [TopK(5, "signed"), ReLU(), BatchTopK(0.25), JumpReLU(torch.tensor([0.5, 1.5]))], ids=repr
)
def test_spec_round_trip(activation: Activation) -> None:
    again = activation_from_spec(*activation_to_spec(activation))
    assert type(again) is type(activation)
    for field in dataclasses.fields(activation):
        left, right = getattr(activation, field.name), getattr(again, field.name)
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right


@pytest.mark.parametrize(
    "spec", [None, {}, {"name": "softmax"}, {"name": "topk"}, {"name": "topk", "k": 3, "more": 1}, {"name": ["topk"]}]
)
def test_unknown_spec_is_refused(spec: object) -> None:
    with pytest.raises(ValueError, match="activation"):
        activation_from_spec(spec, {})


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TopK(0)
    with pytest.raises(TypeError, match="integer"):
        TopK(2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="relu_after, relu_before, signed"):
        TopK(2, "relu")
    with pytest.raises(ValueError, match="finite"):
        BatchTopK(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        JumpReLU(torch.tensor([0.0, float("nan")]))
    with pytest.raises(ValueError, match="2 thresholds for a dictionary of 3"):
        JumpReLU(torch.zeros(2)).check(3)
