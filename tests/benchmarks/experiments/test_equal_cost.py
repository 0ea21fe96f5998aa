"""Effects read off at a budget of perplexity, and rows beside SFT."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_rows import switching_row

from benchmarks.experiments.equal_cost import arm_at_cost, cost_curve, paired_difference, read_off
from benchmarks.experiments.switching_rows import (
    Compared,
    by_arm,
    compared_with_sft,
    switching_rows,
)


def compared(*rows) -> list[Compared]:
    return compared_with_sft(switching_rows(rows))


def test_cost_and_effect_of_a_run():
    (pair,) = compared(
        switching_row(target=99), switching_row("token_penalty", 20.0, 0.8, 0.6, expected=0.7, target=49)
    )
    assert pair.cost() == pytest.approx(0.8)
    assert pair.effect("hazard") == pytest.approx(-40)
    assert pair.effect("expected") == pytest.approx(-30)
    assert pair.effect("sampled") == pytest.approx(100 * (49.5 / 99.5 - 1))


def test_words_use_entry_and_plain_perplexity():
    rows = [switching_row(identify="words"), switching_row("token_penalty", 20.0, 0.8, 0.6, identify="words")]
    rows[1]["metrics"]["test"]["hz"] = 5.0  # no use may be made of it
    rows[1]["metrics"]["test"]["masked_ppl"] = 99.0
    rows[1]["metrics"]["test"]["entry"] = -4.0 + math.log(0.25)
    (pair,) = compared(*rows)
    assert pair.effect("hazard") == pytest.approx(-75)
    assert pair.cost() == pytest.approx(0.8)


def test_zero_counts_have_a_finite_effect():
    (pair,) = compared(switching_row(target=0), switching_row("token_penalty", 20.0, target=0))
    assert pair.effect("sampled") == 0
    (pair,) = compared(switching_row(target=10), switching_row("token_penalty", 20.0, target=0))
    assert pair.effect("sampled") == pytest.approx(100 * (0.5 / 10.5 - 1))


def test_a_budget_between_two_weights():
    # From (0.4, log .8) to (1.2, log .5): at 1.0 three quarters of the way.
    value, capped = read_off([(0.4, math.log(0.8)), (1.2, math.log(0.5))], 1.0)
    assert value == pytest.approx(0.25 * math.log(0.8) + 0.75 * math.log(0.5))
    assert not capped


def test_a_budget_below_the_weakest_weight_starts_at_sft():
    value, capped = read_off([(2.0, math.log(0.25))], 0.5)
    assert math.exp(value) == pytest.approx(0.25**0.25)
    assert not capped


def test_a_budget_that_is_never_reached_gives_the_strongest_weight():
    assert read_off([(0.2, -0.1), (0.3, -0.2)], 1.0) == (-0.2, True)
    assert read_off([(1.0, -0.1)], 1.0) == (-0.1, False)


def test_negative_and_falling_costs_take_the_first_crossing():
    # Cost falls below SFT's first, then rises: at .5 half way from (-.5, -.4) to (1.5, -.8).
    assert read_off([(-0.5, -0.4), (1.5, -0.8)], 0.5) == (pytest.approx(-0.6), False)
    # 1.0 is crossed between the first two weights, and again later.
    value, _ = read_off([(0.5, -0.1), (1.5, -0.3), (0.6, -0.5), (2.0, -0.9)], 1.0)
    assert value == pytest.approx(-0.2)


def test_what_cannot_be_read_off():
    with pytest.raises(ValueError, match="at least one point"):
        read_off([], 1.0)
    with pytest.raises(ValueError, match="budget above 0"):
        read_off([(1.0, -0.1)], 0.0)


POINTS = st.lists(st.tuples(st.floats(-3, 5), st.floats(-4, 1)), min_size=1, max_size=6)


@given(POINTS, st.floats(0.05, 6))
def test_values_read_off_stay_within_the_curve(points, budget):
    value, capped = read_off(points, budget)
    values = [0.0, *(value for _, value in points)]
    assert min(values) - 1e-9 <= value <= max(values) + 1e-9
    assert capped == (max(cost for cost, _ in points) < budget)


@given(st.lists(st.floats(0.05, 2), min_size=1, max_size=6), st.floats(0.1, 4), st.floats(0.1, 4))
def test_on_a_falling_curve_more_budget_never_does_less(steps, one, other):
    costs = [sum(steps[: place + 1]) for place in range(len(steps))]
    points = [(cost, -0.3 * cost) for cost in costs]
    small, large = sorted((one, other))
    assert read_off(points, large)[0] <= read_off(points, small)[0] + 1e-12


def grid(base: int, seed: int, shift: float = 0.0) -> list[dict]:
    """Token penalty at 1 %: -50 % and 10 points of `shift` less; SASFT is capped at -30 %."""
    place = {"base": base, "seed": seed}
    return [
        switching_row(**place),
        switching_row("token_penalty", 20.0, 1.0, 0.5 + shift, **place),
        switching_row("token_penalty", 10.0, 0.5, 0.7, **place),
        switching_row("sasft_combined", 0.1, 0.6, 0.7, **place),
    ]


def test_arms_at_equal_cost_over_bases():
    rows = [*grid(0, 101), *grid(1, 101, 0.1), *grid(2, 101, 0.2)]
    arms = by_arm(compared(*rows))
    token, sasft = arm_at_cost(arms["token_penalty"], 1.0), arm_at_cost(arms["sasft_combined"], 1.0)
    # Effects -50 -40 -30: mean -40, sd 10, 4.30265 * 10 / sqrt(3) = 24.8414.
    assert token.effect.estimate == pytest.approx(-40)
    assert token.effect.low == pytest.approx(-40 - 24.8414, abs=1e-3)
    assert (token.effect.unit, token.capped) == ("bases", 0)
    assert sasft.effect.estimate == pytest.approx(-30)
    assert sasft.capped == 3
    difference = paired_difference(sasft, token)
    # 20, 10, 0.
    assert difference.estimate == pytest.approx(10)
    assert difference.low == pytest.approx(10 - 24.8414, abs=1e-3)
    half = arm_at_cost(arms["token_penalty"], 0.25)
    assert half.effect.estimate == pytest.approx(100 * (math.sqrt(0.7) - 1))


def test_one_base_takes_its_runs():
    arms = by_arm(compared(*grid(0, 101), *grid(0, 102, 0.1)))
    token = arm_at_cost(arms["token_penalty"], 1.0)
    assert (token.effect.unit, token.effect.count) == ("runs", 2)
    # -50 and -40: sd 7.0711, t of 1 degree of freedom 12.7062, over sqrt(2).
    assert token.effect.high == pytest.approx(-45 + 12.7062 * 5, abs=1e-2)


def test_difference_uses_shared_runs_only():
    rows = [*grid(0, 101), *grid(0, 102, 0.2)]
    rows = [row for row in rows if not (row["arm"] == "sasft_combined" and row["seed"] == 102)]
    arms = by_arm(compared(*rows))
    difference = paired_difference(arm_at_cost(arms["sasft_combined"], 1.0), arm_at_cost(arms["token_penalty"], 1.0))
    assert difference.estimate == pytest.approx(20)
    assert difference.count == 1
    other = by_arm(compared(*grid(5, 7)))
    with pytest.raises(ValueError, match="share none"):
        paired_difference(arm_at_cost(arms["token_penalty"], 1.0), arm_at_cost(other["token_penalty"], 1.0))


def test_curve_is_ordered_by_weight():
    arms = by_arm(compared(*grid(0, 101), *grid(0, 102)))
    weak, strong = cost_curve(arms["token_penalty"])
    assert (weak.weight, strong.weight) == (10.0, 20.0)
    assert weak.cost.estimate == pytest.approx(0.5)
    assert strong.effect.estimate == pytest.approx(-50)


def test_a_missing_sft_row_is_named():
    with pytest.raises(ValueError, match=r"token_penalty.*cell 'ko', base 2 and seed 103"):
        compared(
            switching_row(cell="ko", base=2, seed=102),
            switching_row("token_penalty", 20.0, cell="ko", base=2, seed=103),
        )


def test_the_model_before_sft_may_have_a_seed_of_its_own():
    assert compared(switching_row(), switching_row("base", seed=0)) == []
    assert by_arm(compared(switching_row(), switching_row("base"))) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identify": "guess"}, "identify"),
        ({"sampled": {"prompts": 4, "target": 5, "any": 5, "endless": 0}}, "between 0"),
        ({"metrics": {"val": {}, "test": {}}}, "has no 'hz'"),
    ],
)
def test_bad_rows_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        switching_rows([{**switching_row(), **change}])


def test_rows_without_samples_twice_and_of_another_kind():
    rows = [switching_row(target=None), switching_row("token_penalty", 1.0, target=None)]
    (pair,) = compared(*rows)
    assert not pair.has_samples
    with pytest.raises(ValueError, match="no samples"):
        pair.effect("sampled")
    with pytest.raises(ValueError, match="two rows"):
        switching_rows([switching_row(), switching_row()])
    assert switching_rows([{"kind": "repetition"}]) == []
