"""Statistics of sparse codes against a dense code."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope_posttrain.kernels import statistics
from qscope_posttrain.kernels.statistics import _feature_statistics_, feature_statistics_

GROUPS, D_SAE = 3, 11


def case(tokens, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    values[values.abs() < 0.3] = 0
    indices = torch.randint(D_SAE, (tokens, width), generator=generator, dtype=torch.int32)
    return values, indices, torch.randint(-1, GROUPS, (tokens,), generator=generator)


def empty(low=-math.inf):
    return {
        "activation_sum": torch.zeros(GROUPS, D_SAE, dtype=torch.float64),
        "firing_count": torch.zeros(GROUPS, D_SAE, dtype=torch.int64),
        "maximum": torch.full((GROUPS, D_SAE), low),
    }


def expected_of(values, indices, groups):
    found = empty()
    for t, group in enumerate(groups.tolist()):
        for value, index in zip(values[t].tolist(), indices[t].tolist(), strict=True):
            if group >= 0 and value != 0:
                found["activation_sum"][group, index] += value
                found["firing_count"][group, index] += value > 0
                found["maximum"][group, index] = max(float(found["maximum"][group, index]), value)
    return found


def assert_same(found, expected):
    torch.testing.assert_close(found["activation_sum"], expected["activation_sum"], rtol=1e-14, atol=1e-14)
    assert torch.equal(found["firing_count"], expected["firing_count"])
    assert torch.equal(found["maximum"], expected["maximum"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(9, 4), (40, 25), (1, 1), (0, 4), (5, 0)])
def test_against_loops(dtype, tokens, width):
    values, indices, groups = case(tokens, width, dtype)
    found, expected = empty(), expected_of(values, indices, groups)
    if dtype == torch.float64:
        expected["maximum"] = expected["maximum"].float()
    feature_statistics_(values, indices, groups, **found)
    assert_same(found, expected)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 999), st.data())
@settings(max_examples=50, deadline=None)
def test_calls_add_up_in_any_division_and_order(tokens, width, seed, data):
    values, indices, groups = case(tokens, width, torch.float32, seed)
    whole, parts = empty(), empty()
    feature_statistics_(values, indices, groups, **whole)
    order = torch.tensor(data.draw(st.permutations(range(tokens))))
    for piece in order.split(data.draw(st.integers(1, tokens))):
        feature_statistics_(values[piece], indices[piece].long(), groups[piece].int(), **parts)
    assert_same(parts, whole)


def test_tiles_change_nothing(monkeypatch):
    values, indices, groups = case(50, 7)
    whole, tiled = empty(), empty()
    feature_statistics_(values, indices, groups, **whole)
    monkeypatch.setattr(statistics, "ENTRIES_AT_A_TIME", 20)
    feature_statistics_(values, indices, groups, **tiled)
    assert_same(tiled, whole)
    assert torch.equal(tiled["activation_sum"], whole["activation_sum"])


def test_a_token_left_out_may_hold_anything():
    values, indices, groups = case(30, 5)
    found, expected = empty(), empty()
    feature_statistics_(values, indices, groups, **expected)
    values[groups < 0] = torch.nan
    feature_statistics_(values, indices, groups, **found)
    assert_same(found, expected)
    values[0], groups[0] = torch.tensor([torch.nan, 1.0, 1.0, 1.0, 1.0]), 1
    indices[0] = torch.arange(5)
    feature_statistics_(values, indices, groups, **found)
    assert bool(found["activation_sum"][1, 0].isnan())
    assert int(found["activation_sum"].isnan().sum()) == 1


def test_one_group_and_strides():
    values, indices, _ = case(8, 6)
    one = {name: sums[:1].contiguous() for name, sums in empty().items()}
    other = {name: sums.clone() for name, sums in one.items()}
    feature_statistics_(values, indices, **one)
    feature_statistics_(values.t().contiguous().t(), indices.t().contiguous().t(), **other)
    assert_same(one, other)


def test_opcheck_and_compile():
    values, indices, groups = case(6, 4)
    sums = empty()
    torch.library.opcheck(_feature_statistics_, (values, indices, groups, *sums.values()))
    torch.library.opcheck(_feature_statistics_, (values, indices, groups, None, sums["firing_count"], None))

    def step(values, **sums):
        feature_statistics_(values, indices, groups, **sums)
        return sums["activation_sum"].sum()

    eager, compiled = empty(), empty()
    total = step(values, **eager)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(values, **compiled), total)
    assert_same(compiled, eager)


def test_bad_input():
    values, indices, groups = case(6, 4)
    sums = empty()
    with pytest.raises(ValueError, match="nothing to add to"):
        feature_statistics_(values, indices, groups)
    with pytest.raises(TypeError, match=r"activation_sum must be torch.float64"):
        feature_statistics_(values, indices, groups, activation_sum=sums["maximum"])
    with pytest.raises(ValueError, match="contiguous"):
        feature_statistics_(values, indices, groups, maximum=sums["maximum"].t().contiguous().t())
    with pytest.raises(ValueError, match="like the others"):
        feature_statistics_(values, indices, groups, firing_count=sums["firing_count"][:2], maximum=sums["maximum"])
    with pytest.raises(ValueError, match=f"indices must lie below {D_SAE}"):
        feature_statistics_(values, indices + D_SAE, groups, **sums)
    with pytest.raises(ValueError, match=f"groups must lie below {GROUPS}"):
        feature_statistics_(values, indices, groups + GROUPS, **sums)
    with pytest.raises(ValueError, match=r"groups must be \[6\]"):
        feature_statistics_(values, indices, groups[:5], **sums)
    with pytest.raises(ValueError, match="groups is on meta"):
        feature_statistics_(values, indices, groups.to("meta"), **sums)
