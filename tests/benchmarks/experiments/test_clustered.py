"""Intervals over base models."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.experiments.clustered import clustered_interval, clustered_rate
from qscope_posttrain.intervals import wilson

FINITE = st.floats(-1e3, 1e3)
BASES = st.dictionaries(st.integers(0, 9), st.lists(FINITE, min_size=1, max_size=5), min_size=1, max_size=6)


def test_three_bases_take_their_means():
    found = clustered_interval({0: [1.0, 3.0], 1: [4.0], 2: [6.0]})
    # Means 2, 4, 6: mean 4, sd 2, t of 2 degrees of freedom 4.3027; 4.3027 * 2 / sqrt(3) = 4.9683.
    assert found.estimate == 4.0
    assert (found.unit, found.count) == ("bases", 3)
    assert found.low == pytest.approx(4 - 4.96828, abs=1e-4)
    assert found.high == pytest.approx(4 + 4.96828, abs=1e-4)
    assert not found.excludes_zero


def test_two_bases_take_all_runs():
    found = clustered_interval({0: [1.0, 2.0], 1: [3.0, 4.0]})
    # Runs 1 2 3 4: mean 2.5, sd 1.29099, t of 3 degrees of freedom 3.18245, over sqrt(4).
    assert (found.estimate, found.unit, found.count) == (2.5, "runs", 4)
    assert found.high - found.estimate == pytest.approx(3.18245 * 1.29099 / 2, abs=1e-4)
    assert found.excludes_zero


def test_bases_with_unequal_runs_weigh_the_same():
    found = clustered_interval({0: [0.0, 0.0, 0.0], 1: [4.0]})
    # Mean of the means 0 and 4; sd of 0 0 0 4 is 2; sqrt(1/3 + 1) / 2 = .57735.
    assert found.estimate == 2.0
    assert found.high - 2 == pytest.approx(3.18245 * 2 * 0.57735, abs=1e-4)


def test_one_run_has_no_interval():
    found = clustered_interval({4: [-0.5]})
    assert found.estimate == -0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert (found.unit, found.count) == ("runs", 1)
    assert not found.excludes_zero


@pytest.mark.parametrize(
    ("values", "words"),
    [({}, "at least one base"), ({0: []}, "base 0"), ({0: [1.0], 7: [math.nan]}, "base 7")],
)
def test_what_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        clustered_interval(values)


def test_level_is_checked():
    with pytest.raises(ValueError, match="level"):
        clustered_interval({0: [1.0, 2.0]}, level=95)


@given(BASES, st.floats(-100, 100), st.floats(0.1, 10))
def test_moves_and_stretches_with_the_values(values, shift, factor):
    plain = clustered_interval(values)
    moved = clustered_interval({base: [factor * run + shift for run in runs] for base, runs in values.items()})
    assert moved.estimate == pytest.approx(factor * plain.estimate + shift, abs=1e-6)
    if not math.isnan(plain.low):
        assert moved.low == pytest.approx(factor * plain.low + shift, rel=1e-6, abs=1e-5)
        assert moved.high == pytest.approx(factor * plain.high + shift, rel=1e-6, abs=1e-5)


@given(BASES, st.floats(0.5, 0.98))
def test_higher_level_is_wider_and_holds_the_estimate(values, level):
    narrow, wide = clustered_interval(values, level), clustered_interval(values, 0.99)
    if math.isnan(narrow.low):
        assert math.isnan(wide.low)
    else:
        assert wide.low <= narrow.low <= narrow.estimate <= narrow.high <= wide.high


@given(st.lists(FINITE, min_size=3, max_size=6), st.lists(FINITE, min_size=3, max_size=6))
def test_order_of_bases_and_runs_does_not_matter(first, second):
    values = {0: first, 1: second, 2: [1.0]}
    turned = {2: [1.0], 1: second[::-1], 0: first[::-1]}
    one, other = clustered_interval(values), clustered_interval(turned)
    assert other.low == pytest.approx(one.low, abs=1e-7)
    assert other.high == pytest.approx(one.high, abs=1e-7)


def test_rate_of_runs_that_differ():
    found = clustered_rate({0: [(10, 100), (20, 100)], 1: [(30, 100)], 2: [(45, 100)]})
    # Means .15 .3 .45: sd .15, 4.30265 * .15 / sqrt(3) = .37262; below 0 there is no rate.
    assert found.estimate == pytest.approx(0.3)
    assert found.low == 0.0
    assert found.high == pytest.approx(0.67262, abs=1e-4)


def test_rate_without_a_case_has_an_upper_limit():
    found = clustered_rate({0: [(0, 100), (0, 100)], 1: [(0, 100)], 2: [(0, 100)]})
    assert (found.estimate, found.low) == (0.0, 0.0)
    # Wilson: z^2 / (n + z^2) = 3.8415 / 403.8415.
    assert found.high == pytest.approx(0.009512, abs=1e-5)


def test_rate_of_one_run_takes_its_responses():
    found = clustered_rate({0: [(8, 10)]})
    assert found == wilson(8, 10)


@given(
    st.dictionaries(
        st.integers(0, 5),
        st.lists(st.tuples(st.integers(0, 20), st.just(20)), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_rates_stay_within_their_limits(counts):
    found = clustered_rate(counts)
    assert 0 <= found.low <= found.estimate + 1e-12
    assert found.estimate - 1e-12 <= found.high <= 1
    assert found.high > found.low
