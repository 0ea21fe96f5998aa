"""Rates of rare events over runs: exact limits, resampling, counts of zero."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.experiments.rare_counts import Count, pooled, rate_over_runs, rate_ratio, resampled


def runs(events: list[int], samples: int = 1000, bases: list[int] | None = None) -> list[Count]:
    return [Count(base, k, samples) for base, k in zip(bases or [0] * len(events), events, strict=True)]


def test_exact_limits_at_zero_are_those_of_a_power() -> None:
    none = rate_ratio(runs([0]), runs([5]))
    p = 1 - 0.025 ** (1 / 5)
    assert (none.estimate, none.low, none.high) == (0.0, 0.0, pytest.approx(p / (1 - p)))
    many = rate_ratio(runs([5]), runs([0]))
    assert (many.estimate, many.low, many.high) == (math.inf, pytest.approx((1 - p) / p), math.inf)
    nothing = rate_ratio(runs([0]), runs([0]))
    assert math.isnan(nothing.estimate)
    assert (nothing.low, nothing.high) == (0.0, math.inf)


def test_the_ratio_is_one_of_rates() -> None:
    found = rate_ratio(runs([6], samples=100), runs([4], samples=200))
    assert found.estimate == pytest.approx(3.0)
    assert rate_ratio(runs([6], samples=1000), runs([4], samples=2000)).high == pytest.approx(found.high)


def test_runs_that_differ_widen_the_interval_beyond_counts() -> None:
    even = rate_ratio(runs([10, 10, 10, 10]), runs([20, 20, 20, 20]))
    uneven = rate_ratio(runs([0, 40, 0, 0]), runs([20, 20, 20, 20]))
    assert even.estimate == uneven.estimate == 0.5
    assert uneven.low < 0.02 < even.low
    assert uneven.high > 1.2 > even.high
    # Runs that differ in the same way do so together: pairs are drawn.
    paired = rate_ratio(runs([5, 40, 5, 5]), runs([10, 80, 10, 10]))
    assert paired.high < 0.9


def test_resamples_keep_the_runs_of_each_base_where_bases_are_few() -> None:
    weights = resampled([0, 0, 0, 5, 5])
    assert (weights[:, :3].sum(1) == 3).all()
    assert (weights[:, 3:].sum(1) == 2).all()
    assert weights[:, 0].mean() == pytest.approx(1.0, abs=0.05)


def test_resamples_draw_bases_where_there_are_three() -> None:
    weights = resampled([0, 0, 1, 1, 2, 2])
    assert set(weights.sum(1)) == {6}
    without_first = (weights[:, :2].sum(1) == 0).mean()
    assert without_first == pytest.approx((2 / 3) ** 3, abs=0.02)
    assert weights.mean(0) == pytest.approx([1.0] * 6, abs=0.05)


def test_a_rate_has_no_interval_where_resampling_says_nothing() -> None:
    assert rate_over_runs(runs([0, 0, 0])) is None
    assert rate_over_runs(runs([4])) is None
    found = rate_over_runs(runs([0, 4, 8, 4]))
    assert found is not None
    assert found.estimate == pytest.approx(0.004)
    assert 0.0 < found.low < 0.003 < 0.005 < found.high < 0.008


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="in pairs"):
        rate_ratio(runs([1, 2]), runs([1, 2], bases=[0, 1]))
    with pytest.raises(ValueError, match="at least one run"):
        pooled([])
    with pytest.raises(ValueError, match="0 <= events <= samples"):
        pooled(runs([11], samples=10))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=6))
def test_the_limits_hold_the_estimate_and_turn_with_the_sides(pairs: list[tuple[int, int]]) -> None:
    first, second = runs([a for a, _ in pairs]), runs([b for _, b in pairs])
    found, turned = rate_ratio(first, second), rate_ratio(second, first)
    if not math.isnan(found.estimate):
        assert found.low <= found.estimate <= found.high
        for limit, other in ((found.low, turned.high), (found.high, turned.low)):
            assert (
                (limit == 0 and math.isinf(other))
                or limit * other == pytest.approx(1.0, rel=0.02)
                or (math.isinf(limit) and other == 0)
            )
