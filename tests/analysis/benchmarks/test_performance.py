"""Kendall's tau, R, partial correlations, and tests that permute benchmarks: by hand, brute force and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from analysis.benchmarks.cases import draw
from scipy.stats import kendalltau, pearsonr, spearmanr

from qscope_posttrain.analysis.benchmarks.overlap import measure_overlap
from qscope_posttrain.analysis.benchmarks.performance import (
    Agreement,
    PerformanceRedundancy,
    ScoreTable,
    correlate,
    kendall,
    partial_correlation,
    pearson,
    performance_redundancy,
    read_correctness,
    read_scores,
    redundancy_agreement,
    scores_of,
    similarity_agreement,
    spearman,
)
from qscope_posttrain.analysis.benchmarks.redundancy import measure_redundancy
from qscope_posttrain.analysis.benchmarks.report import agreement_table


def test_kendall_equals_scipy_with_ties():
    generator = np.random.default_rng(0)
    full, parts = generator.integers(0, 6, 7), generator.integers(0, 3, (20, 7))
    parts[0] = 1
    expected = [0.0, *(kendalltau(full, part).statistic for part in parts[1:])]
    np.testing.assert_allclose(kendall(full, parts), np.nan_to_num(expected))


def test_r_by_hand():
    """Two items, three models: A right on both, B on the first, C on none; p = (1, 1/2, 0).

    n = 2: tau = 1. n = 1: item 1 gives (1, 1, 0), item 2 (1, 0, 0); tau-b of both is 2 / sqrt(3 * 2).
    """
    found = performance_redundancy("d", [[1, 1, 0], [1, 0, 0]], repeats=20)
    assert found.r == pytest.approx((2 / np.sqrt(6) + 1) / 2)
    assert found.error == pytest.approx(0, abs=1e-12)


@pytest.mark.promise("Redundancy, overlap and correlations of benchmarks equal all subsets counted one by one")
def test_r_equals_all_subsets_one_by_one():
    correct = np.random.default_rng(1).integers(0, 2, (6, 4)).astype(float)
    full = correct.mean(axis=0)
    tau = []
    for size in range(1, 7):
        values = [
            kendalltau(full, correct[list(s)].mean(axis=0)).statistic for s in itertools.combinations(range(6), size)
        ]
        tau.append(np.mean(np.nan_to_num(values)))
    found = performance_redundancy("d", correct, repeats=3000)
    assert abs(found.r - np.mean(tau)) < 4 * found.error
    assert found.error < 0.01


def test_partial_correlation_is_that_of_the_residuals():
    x, y, m = np.random.default_rng(2).normal(size=(3, 30))
    x, y = x + m, y - 2 * m
    residuals = [side - np.polyval(np.polyfit(m, side, 1), m) for side in (x, y)]
    found = partial_correlation(pearson(x, y), pearson(x, m), pearson(y, m))
    assert float(found) == pytest.approx(pearsonr(*residuals).statistic)
    assert float(partial_correlation(0.5, 0.5, 0.5)) == pytest.approx((0.5 - 0.25) / 0.75)
    assert np.isnan(partial_correlation(1.0, 1.0, 1.0))


def test_coefficients_equal_scipy():
    x, y = np.random.default_rng(3).integers(0, 5, (2, 12))
    assert pearson(x, y) == pytest.approx(pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(pearson([1, 1, 1], [1, 2, 3]))


def test_p_counts_permutations_of_benchmarks():
    """Four benchmarks in the same order on both sides: of 24 orders only this one and its reverse reach |r| = 1."""
    found = correlate([1, 2, 3, 4], [2, 4, 6, 8], "spearman")
    assert (found.value, found.p, found.benchmarks, found.points) == (pytest.approx(1), pytest.approx(2 / 24), 4, 4)


def test_pairs_are_tested_by_relabelling_benchmarks():
    """A matrix against itself: with distinct entries no other labelling of it agrees as well."""
    matrix = np.random.default_rng(4).normal(size=(5, 5))
    matrix = matrix + matrix.T
    found = correlate(matrix, matrix, "pearson")
    assert (found.value, found.p, found.points) == (pytest.approx(1), pytest.approx(1 / 120), 10)
    many = correlate(matrix, matrix, "pearson", permutations=60)
    assert many.p >= 1 / 61


def test_the_mantel_test_holds_its_level_where_a_test_over_pairs_does_not():
    """Both sides depend on one number a benchmark, independent of the other side's: no relation, pairs far from
    independent."""
    generator = np.random.default_rng(5)
    mantel, naive = [], []
    for seed in range(150):
        a, b = generator.normal(size=(2, 7))
        one, other = np.add.outer(a, a), np.add.outer(b, b)
        upper = np.triu_indices(7, 1)
        mantel.append(correlate(one, other, "pearson", permutations=99, resamples=2, seed=seed).p <= 0.05)
        naive.append(pearsonr(one[upper], other[upper]).pvalue <= 0.05)
    assert np.mean(mantel) < 0.11
    assert np.mean(naive) > 0.2


def test_the_bootstrap_draws_benchmarks():
    generator = np.random.default_rng(6)
    x = generator.normal(size=30)
    found = correlate(x, x + generator.normal(size=30), "pearson", resamples=500)
    assert found.low < found.value < found.high < 1
    assert (found.low, found.high) != pytest.approx((found.value, found.value))


def table(seed=0, models=8, names=("a", "b", "c", "d", "m")):
    scores = np.random.default_rng(seed).normal(size=(models, len(names)))
    return ScoreTable(tuple(f"model {n}" for n in range(models)), tuple(names), scores)


def test_similarity_of_scores_direct_and_partial():
    scores = table()
    names = ["a", "b", "c"]
    direct, partial = scores.similarity(names), scores.similarity(names, "m")
    a, b, m = (scores.column(name) for name in "abm")
    assert direct[0, 1] == pytest.approx(pearsonr(a, b).statistic)
    expected = partial_correlation(pearson(a, b), pearson(a, m), pearson(b, m))
    assert partial[0, 1] == pytest.approx(float(expected))


def test_agreement_of_overlap_and_performance():
    benchmarks = [draw(name, 12 + 3 * number, number) for number, name in enumerate("abcdm")]
    matrix = measure_overlap(benchmarks)
    sizes = {entry.name: len(entry) for entry in benchmarks}
    scores = table()
    lines = similarity_agreement(matrix, sizes, scores, "m")
    assert [(line.predictor, line.correlation.kind, line.target) for line in lines[:2]] == [
        ("overlap_min", "pearson", "performance"),
        ("overlap_min", "spearman", "performance"),
    ]
    upper = np.triu_indices(5, 1)
    overlap, performance = matrix.values("overlap_min"), scores.similarity(matrix.names)
    assert lines[0].correlation.value == pytest.approx(pearsonr(overlap[upper], performance[upper]).statistic)
    partial = [line for line in lines if line.target == "performance given m"]
    assert {line.correlation.benchmarks for line in partial} == {4}
    fewer = np.triu_indices(4, 1)
    expected = spearmanr(overlap[:4, :4][fewer], scores.similarity("abcd", "m")[fewer]).statistic
    assert partial[1].correlation.value == pytest.approx(expected)
    assert lines[4].predictor == "ratio of sizes (control)"
    with pytest.raises(ValueError, match="needs 4 benchmarks with scores"):
        similarity_agreement(matrix, sizes, table(names=("a", "b", "m")))


def test_agreement_of_r_and_r_hat():
    found = [measure_redundancy(draw(name, 10 + 5 * number, number), repeats=0) for number, name in enumerate("abcde")]
    r = {entry.name: PerformanceRedundancy(entry.name, entry.items, 3, 0.1 * entry.items, 0, 1) for entry in found}
    lines, given_size = redundancy_agreement(found, r)
    assert lines[2].predictor == "N alone (control)"
    assert lines[2].correlation.value == pytest.approx(1)  # R was made to follow the size
    assert np.isnan(given_size)
    expected = spearmanr([entry.r_hat.estimate for entry in found], [r[entry.name].r for entry in found]).statistic
    assert lines[0].correlation.value == pytest.approx(expected)
    with pytest.raises(ValueError, match="need 4 benchmarks with both"):
        redundancy_agreement(found[:3], r)


def test_tables_on_disk(tmp_path):
    (tmp_path / "scores.csv").write_text("model,gsm8k,mmlu\nA,0.5,0.25\nB,0.75,1\nC,0,0.5\n")
    scores = read_scores(tmp_path / "scores.csv")
    assert (scores.models, scores.benchmarks) == (("A", "B", "C"), ("gsm8k", "mmlu"))
    assert scores.column("mmlu").tolist() == [0.25, 1, 0.5]
    (tmp_path / "gsm8k.csv").write_text("A,B,C\n1,0,1\n1,1,0\n")
    correctness = read_correctness(tmp_path, ["gsm8k", "mmlu"])
    assert list(correctness) == ["gsm8k"]
    assert scores_of(correctness).scores.tolist() == [[1.0], [0.5], [0.5]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model,a\nA,x\nB,1\nC,1\n", "could not convert"),
        ("model,a\nA,1,2\n", "as many cells"),
        ("model,a\nA,1\nB,2\n", "at least 3 models"),
        ("model,a\nA,1\nB,2\nC,nan\n", "a score on every benchmark"),
        ("model,a\n", "a header and rows"),
    ],
)
def test_refusals_of_tables(tmp_path, content, message):
    (tmp_path / "scores.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_scores(tmp_path / "scores.csv")


def test_refusals():
    with pytest.raises(FileNotFoundError, match="no table"):
        read_scores("nowhere.csv")
    with pytest.raises(FileNotFoundError, match="no <benchmark>"):
        read_correctness("nowhere", ["a"])
    with pytest.raises(ValueError, match="no scores for 'x'"):
        table().column("x")
    with pytest.raises(ValueError, match="same score on a"):
        ScoreTable(("1", "2", "3"), ("a", "b"), np.array([[1.0, 1], [1, 2], [1, 3]])).similarity(["a", "b"])
    with pytest.raises(ValueError, match="no order to keep"):
        performance_redundancy("d", [[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="at least 4"):
        correlate([1, 2, 3], [1, 2, 3], "pearson")
    with pytest.raises(ValueError, match="finite"):
        correlate([1, 2, 3, np.nan], [1, 2, 3, 4], "pearson")


def test_the_table_says_why_a_control_has_no_correlation():
    r = [0.2, 0.4, 0.5, 0.9]
    lines = [
        Agreement("N alone (control)", "R", correlate([28.0] * 4, r, "spearman")),
        Agreement("R-hat", "R", correlate([1.0, 2.0, 3.0, 4.0], r, "spearman")),
    ]
    table = agreement_table("Agreement", lines)
    assert table.rows[0][4] is None
    assert table.rows[1][4] is not None
    assert "the same for all benchmarks" in table.caption
    assert "the same for all" not in agreement_table("Agreement", lines[1:]).caption
