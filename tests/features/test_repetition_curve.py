"""The steering curve: its rule of choice on made-up numbers, its completions and its probabilities on small models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from looping_model import CIRCLE, SHARE, WIDTH, looping_model, looping_prompts, looping_tokenizer

from qscope_posttrain.features import dose_curve
from qscope_posttrain.features.dose_curve import (
    FEATURE,
    MEANS,
    RANDOM,
    UNSTEERED,
    CurvePoint,
    CurveSettings,
    Trial,
    measure_loops,
    unlikely_tokens,
)
from qscope_posttrain.features.find.repetition_curve import SteeringCurve, choose, margin
from qscope_posttrain.intervals import rate_difference
from qscope_posttrain.models.generation import SamplingSettings, encode_prompts, sample_batch
from qscope_posttrain.models.steering import Steering, Window, steer
from qscope_posttrain.text.repetition import is_endless_repetition

SAMPLING = SamplingSettings(top_p=1.0, max_new_tokens=32, batch_size=48)
TOKENS = 1000


def point(kind: str, layer: int, strength: float, looped: int, unlikely: int = 0, *, name="", window=30, n=100, own=-1):
    own = looped if own < 0 else own
    return CurvePoint(
        Trial(kind, name or kind, layer, strength=strength, window_length=window), n, looped, own, TOKENS, unlikely
    )


def chosen_name(points) -> str | None:
    found = choose(points)
    return None if found is None else found.trial.name


class TestChoice:
    def test_the_margin_over_random_counts_and_not_the_loop_share(self):
        """An early layer that loops after any push is not preferred, however often it loops."""
        points = [
            point(FEATURE, 0, 1.0, 80, 10, name="early"), point(RANDOM, 0, 1.0, 49),
            point(FEATURE, 2, 1.0, 70, 40, name="late"), point(RANDOM, 2, 1.0, 6),
        ]  # fmt: skip
        assert chosen_name(points) == "late"
        assert margin(points, points[0]) == rate_difference((80, 100), (49, 100))

    def test_only_loops_like_the_models_own_count(self):
        points = [
            point(FEATURE, 1, 1.25, 76, name="stutter", own=5), point(RANDOM, 1, 1.25, 8, own=0),
            point(FEATURE, 2, 1.0, 40, name="habit"), point(RANDOM, 2, 1.0, 9),
        ]  # fmt: skip
        assert chosen_name(points) == "habit"
        assert margin(points, points[0]) == rate_difference((5, 100), (0, 100))
        assert choose([replace(points[0], own=0), points[1]]) is None

    def test_a_push_that_beats_its_random_directions_by_nothing_is_not_eligible(self):
        points = [
            point(FEATURE, 0, 1.0, 80, name="unspecific"), point(RANDOM, 0, 1.0, 75),
            point(FEATURE, 2, 1.0, 20, 500, name="specific"), point(RANDOM, 2, 1.0, 2),
        ]  # fmt: skip
        assert chosen_name(points) == "specific"

    def test_within_one_standard_error_the_text_nearest_to_the_model_wins(self):
        points = [
            point(FEATURE, 2, 1.25, 74, 120, name="best"), point(RANDOM, 2, 1.25, 4),
            point(FEATURE, 2, 1.0, 72, 60, name="near"), point(RANDOM, 2, 1.0, 4),
            point(FEATURE, 2, 0.75, 60, 10, name="too weak"), point(RANDOM, 2, 0.75, 4),
        ]  # fmt: skip
        assert chosen_name(points) == "near"

    def test_ties_go_to_the_smaller_strength_then_to_the_larger_margin(self):
        points = [
            point(FEATURE, 2, 1.0, 72, name="strong"), point(RANDOM, 2, 1.0, 4),
            point(FEATURE, 2, 0.75, 70, name="weak"), point(RANDOM, 2, 0.75, 4),
            point(FEATURE, 2, 0.75, 71, name="weak and better"),
        ]  # fmt: skip
        assert chosen_name(points) == "weak and better"

    def test_windows_have_controls_of_their_own(self):
        points = [
            point(FEATURE, 2, 1.0, 60, name="short"), point(RANDOM, 2, 1.0, 5),
            point(FEATURE, 2, 1.0, 65, name="long", window=0), point(RANDOM, 2, 1.0, 60, window=0),
        ]  # fmt: skip
        assert chosen_name(points) == "short"

    def test_without_a_specific_point_the_largest_margin_and_without_a_loop_nothing(self):
        points = [
            point(FEATURE, 0, 1.0, 30, name="less"), point(FEATURE, 0, 1.0, 39, name="more"), point(RANDOM, 0, 1.0, 35),
        ]  # fmt: skip
        assert chosen_name(points) == "more"
        assert choose([point(FEATURE, 0, 1.0, 0), point(RANDOM, 0, 1.0, 30)]) is None
        assert choose([point(RANDOM, 0, 1.0, 30), point(MEANS, 0, 1.0, 50), point(UNSTEERED, 0, 0.0, 10)]) is None

    def test_a_limit_on_unlikely_tokens_rules_points_out(self):
        points = [
            point(FEATURE, 1, 1.25, 76, 95, name="far"), point(RANDOM, 1, 1.25, 8),
            point(FEATURE, 2, 1.0, 51, 59, name="near"), point(RANDOM, 2, 1.0, 9),
        ]  # fmt: skip
        assert chosen_name(points) == "far"
        assert choose(points, 0.06).trial.name == "near"
        assert choose(points, 0.01) is None

    def test_random_directions_must_have_been_measured(self):
        with pytest.raises(ValueError, match="No random directions"):
            choose([point(FEATURE, 0, 1.0, 5), point(RANDOM, 0, 0.5, 5)])


class TestCurve:
    def curve(self, fresh_own: int) -> SteeringCurve:
        scan = (point(FEATURE, 2, 1.0, 70, 50, name="loop #5"), point(RANDOM, 2, 1.0, 6), point(MEANS, 2, 1.0, 30))
        fresh = (
            point(UNSTEERED, 0, 0.0, 1, n=200), point(FEATURE, 2, 1.0, 120, 70, name="loop #5", n=200, own=fresh_own),
            point(RANDOM, 2, 1.0, 20, n=200, own=12), point(MEANS, 2, 1.0, 64, n=200),
        )  # fmt: skip
        return SteeringCurve(scan, scan[0], fresh, CurveSettings(window_start=(4, 9), sampling=SAMPLING), (4, 32))

    def test_settings_hold_the_fresh_numbers(self):
        curve = self.curve(110)
        assert curve.specific
        assert curve.to_settings("loop") == {
            "label": "loop", "layer": 2, "strength": 1.0, "unit": "relative", "window_start": [4, 9],
            "window_length": 30, "looped": 0.6, "random": 0.1, "difference_of_means": 0.32, "unsteered": 0.005,
            "own_looped": 0.55, "own_random": 0.06, "own_difference_of_means": 0.32, "own_unsteered": 0.005,
            "periods": [4, 32], "unlikely_tokens": 0.07, "samples": 200, "specific": True,
        }  # fmt: skip
        assert (
            "loop #5 in layer 2 at strength 1, looping like the model itself in 55% of completions against 6%"
            in curve.verdict()
        )

    def test_a_choice_that_does_not_hold_on_fresh_completions_is_not_specific(self):
        curve = self.curve(18)
        assert not curve.specific
        assert curve.to_settings("loop")["specific"] is False
        assert curve.verdict().startswith("Not specific")

    def test_nothing_chosen(self):
        curve = replace(self.curve(0), chosen=None, fresh=())
        assert not curve.specific
        assert curve.to_settings("loop") is None
        assert "nothing is chosen" in curve.to_table().caption

    def test_the_table_marks_the_choice(self):
        table = self.curve(110).to_table()
        chosen = table.columns.index("chosen")
        assert [row[chosen] for row in table.rows] == ["*", "", "", "", "*", "", ""]
        assert table.rows[0][table.columns.index("like own")] == 0.7
        assert [table.rows[4][table.columns.index(name)] for name in ("looped", "like own")] == [0.6, 0.55]
        assert "blocks of 4 to 32 tokens" in table.caption
        assert table.rows[0][table.columns.index("p < 0.001")] == 0.05
        assert table.rows[3][table.columns.index("layer")] == 0


def unit_row(*dimensions: int) -> torch.Tensor:
    rows = torch.zeros(len(dimensions), WIDTH)
    rows[range(len(dimensions)), list(dimensions)] = 1.0
    return rows


class TestMeasure:
    settings = CurveSettings(window_start=(2, 6), window_lengths=(8,), random_directions=2, sampling=SAMPLING)

    @pytest.fixture(scope="class")
    @staticmethod
    def world():
        model, tokenizer = looping_model(), looping_tokenizer()
        return model, tokenizer, encode_prompts(tokenizer, looping_prompts())

    def test_counts_equal_a_loop_over_the_batches(self, world, monkeypatch):
        """Trials of different layers, windows and directions share batches; each row gets exactly its own push."""
        model, tokenizer, prompts = world
        trials = [
            Trial(UNSTEERED, UNSTEERED),
            Trial(FEATURE, "share", 0, unit_row(SHARE), 2.0, strength=0.75, window_length=8),
            Trial(RANDOM, "two", 1, unit_row(SHARE, SHARE + 1), 1.0, strength=1.0, window_length=8),
            Trial(FEATURE, "to the end", 1, unit_row(SHARE), 1.0, strength=0.5, window_length=0),
        ]
        seen = []

        def recorded(model, tokenizer, ids, sampling):
            found = sample_batch(model, tokenizer, ids, sampling)
            seen.append((ids, sampling.seed, found))
            return found

        monkeypatch.setattr(dose_curve, "sample_batch", recorded)
        samples = 20
        points = measure_loops(model, tokenizer, prompts, trials, samples, self.settings, seed=5, periods=(4, 8))
        assert [len(ids) for ids, _, _ in seen] == [48, 32]
        assert len({seed for _, seed, _ in seen}) == 2
        completions = [found for _, _, batch in seen for found in batch]
        starts = torch.randint(2, 7, (samples,), generator=torch.Generator().manual_seed(5))
        offset = 0
        for ids, seed, found in seen:  # the same batch with one steering for each row
            steerings = []
            for place in range(len(ids)):
                number, j = divmod(offset + place, samples)
                trial = trials[number]
                assert list(ids[place]) == list(prompts[j])
                if trial.vectors is None:
                    continue
                vector = trial.vectors[j % len(trial.vectors)] * trial.strength * trial.norm
                rows = torch.arange(len(ids)) == place
                window = Window(int(starts[j]), trial.window_length or None)
                steerings.append(Steering(vector, (trial.layer,), positions=window, rows=rows))
            with steer(model, *steerings, require_generated=False):
                assert sample_batch(model, tokenizer, ids, replace(SAMPLING, seed=seed)) == found
            offset += len(ids)
        for number, point in enumerate(points):
            own = completions[number * samples : (number + 1) * samples]
            assert point.trial is trials[number]
            assert point.samples == samples
            assert point.tokens == sum(len(ids) for ids, _ in own)
            assert point.looped == sum(is_endless_repetition(ids, ended=ended) for ids, ended in own)
            assert point.own == point.looped  # in circles of four
        shares = [point.looped_share for point in points]
        assert shares[0] < 0.4 < shares[1]
        assert points[3].looped > points[0].looped

    def test_loops_of_another_length_are_not_like_the_models_own(self, world):
        model, tokenizer, prompts = world
        trials = [Trial(FEATURE, "share", 0, unit_row(SHARE), 1.0, strength=1.0, window_length=8)]
        for periods, counted in (((1, 3), False), ((5, 99), False), ((4, 4), True), (None, True)):
            (point,) = measure_loops(model, tokenizer, prompts, trials, 12, self.settings, seed=1, periods=periods)
            assert point.looped > 2
            assert point.own == (point.looped if counted else 0)

    def test_the_same_seed_gives_the_same_points(self, world):
        model, tokenizer, prompts = world
        trials = [Trial(FEATURE, "share", 0, unit_row(SHARE), 1.0, strength=0.75, window_length=8)]
        one, two, other = (
            measure_loops(model, tokenizer, prompts, trials, 12, self.settings, seed=s) for s in (1, 1, 2)
        )
        assert one == two
        assert one != other

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_unlikely_tokens_equal_a_loop_over_tokens(self, world, temperature):
        model, _, prompts = world
        rare = CIRCLE[2]
        given = [
            (tuple(prompts[0]), (2, 3, rare, 13, 10, 4)),
            (tuple(prompts[1]), ()),
            ((), (rare, 13, 10)),
            (tuple(prompts[2]), (10, 12, 2, 13, 13)),
        ]
        expected = []
        for prompt, response in given:
            count, ids = 0, prompt + response
            for i in range(max(1, len(prompt)), len(ids)):
                with torch.no_grad():
                    logits = model(torch.tensor([ids[:i]])).logits[0, -1] / temperature
                count += bool(logits.softmax(0)[ids[i]] < 1e-3)
            expected.append(count)
        assert sum(expected) > 2
        for tokens_per_batch in (1, 8192):
            assert unlikely_tokens(model, *zip(*given, strict=True), 1e-3, temperature, tokens_per_batch) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": ()}, "strengths must be positive"),
        ({"strengths": (1.0, -1.0)}, "strengths must be positive"),
        ({"window_start": (5, 2)}, "window_start must be"),
        ({"window_start": (0, 32)}, "beyond the 32 tokens"),
        ({"window_lengths": (-1,)}, "cannot be negative"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"probability_floor": 1.0}, "between 0 and 1"),
        ({"max_unlikely_share": 1.5}, "max_unlikely_share"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        CurveSettings(sampling=SAMPLING, **changes)


def test_the_window_is_a_quarter_unless_given():
    assert CurveSettings(sampling=SAMPLING).window_lengths == (8,)
    assert CurveSettings(sampling=SAMPLING, window_lengths=[0, 5]).window_lengths == (0, 5)
