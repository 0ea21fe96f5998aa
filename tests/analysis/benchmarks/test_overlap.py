"""Overlaps by hand and over all subsets, their intervals, shared items, neighbors, recommendations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from analysis.benchmarks.cases import WIDTH, draw, sets_of, union

from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures, fingerprints
from qscope_posttrain.analysis.benchmarks.overlap import (
    MEASURES,
    largest_matched_size,
    matched_pair,
    measure_overlap,
    raw_pair,
)
from qscope_posttrain.analysis.benchmarks.redundancy import jackknife_interval, standard_error
from qscope_posttrain.analysis.benchmarks.report import groups, recommend


def from_sets(name, sets, width=10, texts=None):
    return ItemFeatures.from_sets(name, sets, width, None if texts is None else fingerprints(texts))


def test_by_hand():
    """F1 = {0, 1, 2, 3}, F2 = {2, 3, 4}: two in common, five together."""
    pair = raw_pair(from_sets("a", [[0, 1], [2, 3]]), from_sets("b", [[2], [3, 4]]))
    assert pair.value("overlap") == 2 / 4
    assert pair.value("overlap_min") == 2 / 3
    assert pair.value("jaccard") == 2 / 5
    back = raw_pair(from_sets("b", [[2], [3, 4]]), from_sets("a", [[0, 1], [2, 3]]))
    assert back.value("overlap") == 2 / 3


@pytest.mark.promise("Redundancy, overlap and correlations of benchmarks equal all subsets counted one by one")
def test_equal_size_equals_all_pairs_of_subsets():
    first, second, size = draw("a", 6, 1), draw("b", 8, 2), 2
    one, other = sets_of(first), sets_of(second)
    drawn = [
        (union(s), union(t)) for s in itertools.combinations(one, size) for t in itertools.combinations(other, size)
    ]
    sizes = [np.mean([len(part[side]) for part in drawn]) for side in (0, 1)]
    common = np.mean([len(s & t) for s, t in drawn])
    pair = matched_pair(first, second, size)
    assert pair.value("overlap") == pytest.approx(common / sizes[0])
    assert pair.value("overlap_min") == pytest.approx(common / min(sizes))
    assert pair.value("jaccard") == pytest.approx(common / (sum(sizes) - common))


def test_with_itself_equals_all_pairs_of_disjoint_subsets():
    features, size = draw("a", 7, 3), 3
    sets = sets_of(features)
    drawn = []
    for chosen in itertools.combinations(range(7), size):
        rest = [number for number in range(7) if number not in chosen]
        for others in itertools.combinations(rest, size):
            drawn.append((union(sets[n] for n in chosen), union(sets[n] for n in others)))
    common, whole = np.mean([len(s & t) for s, t in drawn]), np.mean([len(s) for s, _ in drawn])
    pair = matched_pair(features, features, size)
    assert pair.value("overlap") == pytest.approx(common / whole)
    assert pair.value("jaccard") == pytest.approx(common / (2 * whole - common))


@pytest.mark.parametrize("measure", MEASURES)
def test_left_out_values_are_those_of_the_smaller_benchmark(measure):
    first, second = draw("a", 9, 4), draw("b", 11, 5)
    makers = [raw_pair, lambda a, b: matched_pair(a, b, 3)]
    for make in makers:
        pair = make(first, second)
        for features, at in ((first, 0), (second, 1)):
            left_out, units = pair.left_out[features.name]
            assert (units == features.units).all()
            values = left_out.measure(measure)
            for number in range(len(features)):
                rest = features.select(np.arange(len(features)) != number)
                expected = make(rest, second) if at == 0 else make(first, rest)
                assert values[number] == pytest.approx(expected.value(measure))
    itself = matched_pair(first, first, 3)
    values = itself.left_out["a"][0].measure(measure)
    for number in range(9):
        rest = first.select(np.arange(9) != number)
        assert values[number] == pytest.approx(matched_pair(rest, rest, 3).value(measure))


def test_jackknife_of_a_mean_is_the_classical_standard_error():
    values = np.random.default_rng(0).normal(size=20)
    left_out = (values.sum() - values) / 19
    error, units = standard_error([(left_out, np.arange(20))])
    assert units == 20
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(20) * np.sqrt(20 / 19))
    # One observation in two benchmarks counts once, with the sum of what it moves: here nothing.
    assert standard_error([(left_out, np.arange(20)), (-left_out, np.arange(20))])[0] == pytest.approx(0, abs=1e-12)
    assert jackknife_interval(0.5, [(left_out[:1], np.arange(1))], bounds=(0, 1)) == (0.5, 0, 1)


def test_intervals_cover_and_the_bootstrap_would_not():
    """The mean over many draws lies within the limits at least as often as promised; resampled unions are too small."""
    generator = np.random.default_rng(7)
    rates = [generator.gamma(0.3, 0.1, 150).clip(0, 0.9) for _ in range(2)]
    found = []
    for seed in range(120):
        first, second = draw("a", 40, 2 * seed, rates[0], 150), draw("b", 30, 2 * seed + 1, rates[1], 150)
        found.append([raw_pair(first, second).interval("overlap"), matched_pair(first, second, 12).interval("jaccard")])
    values = np.array(found)
    truth = values[:, :, 0].mean(axis=0)
    covered = ((values[:, :, 1] <= truth) & (truth <= values[:, :, 2])).mean(axis=0)
    assert (covered >= 0.93).all()
    assert (values[:, :, 2] - values[:, :, 1]).mean() < 0.5  # and they say something
    resampled = [first.select(generator.integers(40, size=40)).features for _ in range(100)]
    assert max(resampled) < first.features


def test_raw_overlap_follows_size_and_equal_size_does_not():
    rates = np.random.default_rng(8).gamma(0.4, 0.1, 200).clip(0, 0.9)
    small, large, other = draw("s", 30, 1, rates, 200), draw("l", 600, 2, rates, 200), draw("o", 30, 3, rates, 200)
    matrix = measure_overlap([small, large, other])
    assert matrix.raw["s", "l"].value("overlap") > matrix.raw["s", "o"].value("overlap") + 0.1
    assert matrix.matched["s", "l"].value("overlap") == pytest.approx(
        matrix.matched["s", "o"].value("overlap"), abs=0.08
    )
    relative = matrix.relative("s", "l")
    assert relative.low < 1 < relative.high


def test_items_in_both_are_left_out_of_the_larger_one():
    base = draw("base", 30, 1)
    sets = [sorted(entry) for entry in sets_of(base)]
    texts = [f"text {number}" for number in range(30)]
    large, part = from_sets("large", sets, WIDTH, texts), from_sets("part", sets[:10], WIDTH, texts[:10])
    other = draw("other", 12, 9)
    matrix = measure_overlap([large, part, other])
    assert (matrix.shared_items["large", "part"].items, matrix.shared_items["large", "part"].removed) == (10, True)
    rest = large.select(np.arange(10, 30))
    assert matrix.matched["large", "part"].value("jaccard") == matched_pair(rest, part, matrix.size).value("jaccard")
    assert matrix.raw["part", "large"].value("overlap") == 1.0
    assert (matrix.shared_items["large", "other"].items, matrix.shared_items["large", "other"].removed) == (0, False)
    half, same = [*range(5, 30)], [*range(25)]
    twins = measure_overlap([large.select(half), from_sets("twin", sets, WIDTH, texts).select(same), other], size=3)
    assert twins.shared_items["large", "twin"].removed
    for measure in ("overlap_min", "jaccard"):
        np.testing.assert_allclose(twins.values(measure, matched=True), twins.values(measure, matched=True).T)
    twin = from_sets("twin", sets, WIDTH, texts)
    kept = measure_overlap([large, twin])
    assert (kept.shared_items["large", "twin"].items, kept.shared_items["large", "twin"].removed) == (30, False)


def test_nearest_and_recommendation():
    generator = np.random.default_rng(0)
    width = 400
    rates = {name: generator.gamma(0.3, 0.15, width).clip(0, 0.9) for name in ("x", "y")}
    one, two = draw("one", 300, 1, rates["x"], width), draw("two", 300, 2, rates["x"], width)
    apart = draw("apart", 300, 3, rates["y"], width)
    # A broad benchmark: half its items like x, half like another kind.
    halves = [sets_of(draw("h", 200, 4, rates["x"], width)), sets_of(draw("h", 200, 5, rates["y"], width))]
    matrix = measure_overlap([one, two, apart])
    found = matrix.neighbor("one")
    assert (found.nearest, found.next) == ("two", "apart")
    assert found.lead.low > 0
    lines = {line.name: line for line in recommend(matrix)}
    assert {name: line.action for name, line in lines.items()} == {"one": "merge", "two": "merge", "apart": "keep"}
    assert groups(list(lines.values())) == [("one", "two")]
    assert lines["one"].covered.low >= 0.9
    assert "do not distinguish them" in lines["one"].reason
    assert "falls short of 0.9" in lines["apart"].reason
    few = {name: draw(name, 8, seed, rates["x"], width) for name, seed in (("p", 6), ("q", 7))}
    undecided = recommend(measure_overlap([few["p"], few["q"]]))
    assert {line.action for line in undecided} == {"keep (undecided)"}
    broad = ItemFeatures.from_sets("broad", [sorted(a | b) for a, b in zip(*halves, strict=True)], width)
    dropped = recommend(measure_overlap([one, broad]))[0]
    assert (dropped.name, dropped.action, dropped.other) == ("one", "drop", "broad")
    assert dropped.lost == pytest.approx(1 - raw_pair(one, broad).value("overlap"))


def test_relative_with_shared_items_has_a_wider_base():
    base = draw("base", 40, 1)
    sets, texts = [sorted(entry) for entry in sets_of(base)], [f"text {number}" for number in range(40)]
    large, part = from_sets("large", sets, WIDTH, texts), from_sets("part", sets[:12], WIDTH, texts[:12])
    relative = measure_overlap([large, part]).relative("large", "part")
    assert relative.low < relative.estimate < relative.high


def test_refusals():
    a, b = draw("a", 8, 1), draw("b", 8, 2)
    with pytest.raises(ValueError, match="at least two benchmarks of different names"):
        measure_overlap([a])
    with pytest.raises(ValueError, match="at least two benchmarks of different names"):
        measure_overlap([a, draw("a", 8, 2)])
    with pytest.raises(ValueError, match="at least 5 items"):
        measure_overlap([a, draw("b", 4, 2)])
    with pytest.raises(ValueError, match="need at least 9 here; 'a' has 8"):
        measure_overlap([a, b], size=4)
    with pytest.raises(ValueError, match="no feature fires on any item of 'e'"):
        raw_pair(a, ItemFeatures.from_sets("e", [[], [], []], WIDTH))
    with pytest.raises(ValueError, match="threshold"):
        recommend(measure_overlap([a, b]), threshold=0)
    assert largest_matched_size([a, b]) == 3
