"""Intervals against scipy, brute force and their stated coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from qscope_posttrain import intervals
from qscope_posttrain.intervals import bootstrap_difference, bootstrap_over_prompts, rate_difference, wilson


@pytest.mark.promise("Intervals equal scipy's or exact distributions, and cover")
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95]))
def test_wilson_equals_scipy(counts, level):
    successes, n = counts
    expected = binomtest(successes, n).proportion_ci(level, method="wilson")
    estimate, low, high = wilson(successes, n, level)
    assert estimate == successes / n
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= estimate <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match=f"got {successes} of {n}"):
        wilson(successes, n)


@pytest.mark.promise("Intervals equal scipy's or exact distributions, and cover")
def test_bootstrap_equals_the_exact_distribution_over_all_resamples():
    outcomes = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 0]])
    means = outcomes.mean(axis=1)
    exact = [np.mean(draw) for draw in itertools.product(means, repeat=len(means))]
    result = bootstrap_over_prompts(outcomes, resamples=40_000, level=0.8)
    assert result.estimate == pytest.approx(means.mean())
    assert (result.low, result.high) == pytest.approx(np.quantile(exact, [0.1, 0.9]), abs=0.02)


def test_difference_equals_the_exact_paired_distribution():
    first = np.array([[1, 1], [1, 0], [0, 0], [1, 1]])
    second = np.array([[1, 0, 0], [0, 0, 0], [0, 0, 0], [1, 1, 0]])
    differences = first.mean(axis=1) - second.mean(axis=1)
    exact = [np.mean(draw) for draw in itertools.product(differences, repeat=4)]
    result = bootstrap_difference(first, second, resamples=40_000, level=0.8)
    assert result.estimate == pytest.approx(differences.mean())
    assert (result.low, result.high) == pytest.approx(np.quantile(exact, [0.1, 0.9]), abs=0.02)


def test_strata_are_resampled_apart_and_weigh_the_same():
    """Prompts that agree within each stratum leave nothing to vary, however far the strata are apart."""
    strata = [np.zeros((30, 2)), np.ones((3, 5))]
    assert bootstrap_over_prompts(strata) == (0.5, 0.5, 0.5)
    pooled = bootstrap_over_prompts(np.concatenate([np.zeros((30, 2)), np.ones((3, 2))]))
    assert pooled.estimate == pytest.approx(3 / 33)
    assert pooled.high - pooled.low > 0.1


def test_alike_samples_of_a_prompt_do_not_narrow_the_interval():
    prompts = np.arange(40)[:, None] % 4 == 0
    once, repeated = bootstrap_over_prompts(prompts), bootstrap_over_prompts(np.repeat(prompts, 50, axis=1))
    assert repeated == once
    naive = wilson(int(prompts.sum()) * 50, 2000)
    assert naive.high - naive.low < 0.2 * (repeated.high - repeated.low)


def test_seed_and_chunks(monkeypatch):
    outcomes = np.random.default_rng(1).random((57, 3))
    result = bootstrap_over_prompts(outcomes, resamples=1000)
    assert bootstrap_over_prompts(outcomes, resamples=1000) == result
    assert bootstrap_over_prompts(outcomes, resamples=1000, seed=1) != result
    monkeypatch.setattr(intervals, "_CELLS_AT_ONCE", 500)
    assert bootstrap_over_prompts(outcomes, resamples=1000) == pytest.approx(result)


@pytest.mark.promise("Intervals equal scipy's or exact distributions, and cover")
def test_coverage():
    """The 95 % interval holds the true rate in about 95 % of experiments whose prompts differ in difficulty."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        rates = generator.beta(1, 4, size=80)
        outcomes = generator.random((80, 4)) < rates[:, None]
        result = bootstrap_over_prompts(outcomes, resamples=500)
        hits += result.low <= 0.2 <= result.high
    assert 0.91 <= hits / 300 <= 0.98


@pytest.mark.parametrize("outcomes", [[], [1, 0], np.zeros((0, 3)), np.zeros((2, 0)), np.zeros((1, 1, 1))])
def test_wrong_shapes_are_refused(outcomes):
    with pytest.raises(ValueError, match=r"\[prompts, samples\]"):
        bootstrap_over_prompts(outcomes)


def test_other_errors():
    with pytest.raises(ValueError, match="finite"):
        bootstrap_over_prompts([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="same prompts; got 2 and 3"):
        bootstrap_difference(np.zeros((2, 1)), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="level"):
        wilson(1, 2, level=95)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_over_prompts([[1.0]], resamples=0)


def test_rate_difference_equals_the_published_examples():
    """Newcombe, Statistics in Medicine 17 (1998), Table II, method 10: 56/70 - 48/80, 9/10 - 3/10, 0/10 - 0/20."""
    assert rate_difference((56, 70), (48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert rate_difference((9, 10), (3, 10)) == pytest.approx((0.6, 0.1705, 0.8090), abs=5e-5)
    assert rate_difference((0, 10), (0, 20)) == pytest.approx((0.0, -0.1611, 0.2775), abs=5e-5)


def test_rate_difference_turns_its_sign_with_the_order():
    there, back = rate_difference((7, 20), (3, 25)), rate_difference((3, 25), (7, 20))
    assert there == pytest.approx((-back.estimate, -back.high, -back.low))
