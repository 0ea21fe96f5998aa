"""Rarefaction, coverage and R-hat against hand-computed numbers, all subsets one by one, and random subsets."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from analysis.benchmarks.cases import draw, mean_union, r_hat_by_hand, sets_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures
from qscope_posttrain.analysis.benchmarks.redundancy import (
    curve_sizes,
    expected_features,
    measure_redundancy,
    presence,
    presence_over_sizes,
)

SMALL_SETS = st.lists(st.sets(st.integers(0, 5), max_size=4), min_size=3, max_size=7)


def test_by_hand():
    """Three items {0, 1}, {0}, {2}: |F| = 3; E|F(S)| is 4/3 for one item, (2 + 3 + 2)/3 = 7/3 for two, 3 for three."""
    found = measure_redundancy(ItemFeatures.from_sets("d", [[0, 1], [0], [2]], 4), repeats=0)
    assert found.sizes.tolist() == [1, 2, 3]
    np.testing.assert_allclose(found.coverage, [4 / 9, 7 / 9, 1])
    assert found.area.estimate == pytest.approx((4 / 9 + 7 / 9 + 1) / 3)
    assert found.r_hat.estimate == pytest.approx((4 / 9 + 7 / 9 + 1) / 3 * 3 / 3)
    assert (found.features, found.mean_features, found.items_for_90) == (3, 4 / 3, 3)


@pytest.mark.parametrize("items", [1, 2, 7])
def test_presence_is_a_ratio_of_binomials_and_its_sum_telescopes(items):
    for fired in range(items + 1):
        each = [1 - comb(items - fired, size) / comb(items, size) for size in range(items + 1)]
        for size in range(items + 1):
            assert presence([fired], items, size)[0] == pytest.approx(each[size], abs=1e-12)
            assert presence_over_sizes([fired], items, size)[0] == pytest.approx(sum(each[1 : size + 1]), abs=1e-10)


def test_presence_keeps_its_precision_in_a_large_benchmark():
    assert presence([1], 30_000, 17)[0] == pytest.approx(17 / 30_000, rel=1e-6)
    assert presence_over_sizes([1], 30_000)[0] == pytest.approx(30_001 / 2, rel=1e-9)


@pytest.mark.promise("Redundancy, overlap and correlations of benchmarks equal all subsets counted one by one")
@given(SMALL_SETS)
@settings(max_examples=60, deadline=None)
def test_equals_all_subsets_one_by_one(sets):
    features = ItemFeatures.from_sets("d", [sorted(entry) for entry in sets], 6)
    sizes = range(1, len(sets) + 1)
    expected = [mean_union(sets, size) for size in sizes]
    np.testing.assert_allclose(expected_features(features.counts, len(sets), list(sizes)), expected, atol=1e-9)
    if features.features:
        found = measure_redundancy(features, repeats=0, matched_size=len(sets) - 1)
        assert found.r_hat.estimate == pytest.approx(r_hat_by_hand(sets))
        assert found.r_hat_matched.estimate == pytest.approx(sum(expected[:-1]) / expected[-2] ** 2)
        assert (len(sets) + 1) / (2 * len(sets)) <= found.area.estimate + 1e-12 <= 1 + 1e-9
        needed = next(size for size, value in zip(sizes, expected, strict=True) if value >= 0.9 * expected[-1] - 1e-9)
        assert abs(found.items_for_90 - needed) <= (abs(expected[needed - 1] - 0.9 * expected[-1]) < 1e-6)


def test_random_subsets_agree_and_have_a_spread():
    found = measure_redundancy(draw("d", 60, seed=1), repeats=400)
    sampled = found.sampled
    assert abs(sampled.r_hat - found.r_hat.estimate) < 4 * sampled.r_hat_error
    inner = (found.sizes > 3) & (found.sizes < 50)
    assert (sampled.low[inner] < found.coverage[inner]).all()
    assert (found.coverage[inner] < sampled.high[inner]).all()
    again = measure_redundancy(draw("d", 60, seed=1), repeats=400)
    assert again.sampled.r_hat == sampled.r_hat
    assert measure_redundancy(draw("d", 60, seed=1), repeats=400, seed=1).sampled.r_hat != sampled.r_hat


def test_the_left_out_values_are_those_of_the_smaller_benchmark(monkeypatch):
    """The vectorised jackknife against R-hat of the benchmark without each item, computed from scratch."""
    from qscope_posttrain.analysis.benchmarks import redundancy

    features = draw("d", 12, seed=3)
    seen = []
    inner = redundancy.jackknife_interval
    monkeypatch.setattr(
        redundancy, "jackknife_interval", lambda e, parts, *rest: seen.append(parts) or inner(e, parts, *rest)
    )
    found = measure_redundancy(features, matched_size=5, repeats=0)
    for number, key in enumerate(("r_hat", "area", "r_hat_matched")):
        ((values, units),) = seen[number]
        assert (units == features.units).all()
        for left_out in range(12):
            rest = features.select(np.arange(12) != left_out)
            expected = getattr(measure_redundancy(rest, matched_size=5, repeats=0), key).estimate
            assert values[left_out] == pytest.approx(expected)
    assert found.r_hat.low < found.r_hat.estimate < found.r_hat.high


def test_a_copy_of_every_item_halves_nothing_but_time():
    """Twice the items with the same features: R-hat nearly doubles, the size-matched one hardly moves."""
    features = draw("d", 40, seed=4)
    twice = ItemFeatures.from_sets("d", [sorted(entry) for entry in sets_of(features) * 2], features.width)
    one, two = (measure_redundancy(f, matched_size=10, repeats=0) for f in (features, twice))
    assert two.r_hat.estimate == pytest.approx(2 * one.r_hat.estimate, rel=0.15)
    assert two.r_hat_matched.estimate == pytest.approx(one.r_hat_matched.estimate, rel=0.1)


def test_curve_sizes():
    assert curve_sizes(20).tolist() == list(range(1, 21))
    sizes = curve_sizes(30_000)
    assert (sizes[0], sizes[-1]) == (1, 30_000)
    assert len(sizes) <= 128


def test_to_dict_is_json_ready():
    from qscope_posttrain.report.summary import to_json

    values = to_json(measure_redundancy(draw("d", 9, seed=2), repeats=3).to_dict())
    assert set(values["r_hat"]) == {"estimate", "low", "high"}
    assert len(values["coverage"]) == len(values["sizes"]) == len(values["sampled"]["low"])


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ([[0], [1]], {}, "at least 3"),
        ([[], [], []], {}, "no feature fires"),
        ([[0], [1], [2]], {"matched_size": 3}, "between 1 and 2"),
        ([[0], [1], [2]], {"matched_size": 0}, "between 1 and 2"),
        ([[0], [1], [2]], {"level": 95}, "level must lie"),
    ],
)
def test_refusals(sets, options, message):
    with pytest.raises(ValueError, match=message):
        measure_redundancy(ItemFeatures.from_sets("d", sets, 5), repeats=0, **options)


def test_refusals_of_counts():
    with pytest.raises(ValueError, match="subset of 3 items"):
        presence([1], 3, 4)
    with pytest.raises(ValueError, match="fires on 0 to 3"):
        presence([4], 3, 1)
