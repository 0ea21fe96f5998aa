"""From a model that loops by construction to a FeatureSet that makes it loop: the whole chain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from looping_model import CIRCLE, SHARE, WIDTH, looping_model, looping_prompts, looping_sae, looping_tokenizer

from benchmarks.testbed.feature_sets import features_from_directions
from qscope_posttrain.features.build import feature_set_from
from qscope_posttrain.features.dose_curve import CurveSettings
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find.loops import LoopCollection, collect_loops
from qscope_posttrain.features.find.repetition import (
    find_repetition_features,
    repetition_differences,
    repetition_gradients,
    repetition_table,
)
from qscope_posttrain.features.find.repetition_curve import candidates, curve_figures, steering_curve, with_choice
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.features.steering import feature_steering
from qscope_posttrain.models.generation import SamplingSettings, encode_prompts, sample_batch
from qscope_posttrain.models.positions import Window
from qscope_posttrain.models.steering import steer
from qscope_posttrain.models.steering_spec import unit
from qscope_posttrain.report.tables import Table
from qscope_posttrain.text.repetition import is_endless_repetition

SAMPLING = SamplingSettings(top_p=1.0, max_new_tokens=36, batch_size=160)
CURVE = CurveSettings(strengths=(1.0,), samples=40, fresh_samples=50, sampling=SAMPLING)
BENIGN = [list(CIRCLE) * 2, "w0 w1 w0 w1"]


@pytest.fixture(scope="module")
def model():
    return looping_model()


@pytest.fixture(scope="module")
def tokenizer():
    return looping_tokenizer()


@pytest.fixture(scope="module")
def saes():
    return {layer: looping_sae(layer) for layer in (0, 1)}


@pytest.fixture(scope="module")
def loops(model, tokenizer) -> LoopCollection:
    return collect_loops(model, tokenizer, looping_prompts(), wanted=8, settings=SAMPLING)


@pytest.fixture(scope="module")
def found(model, tokenizer, saes, loops) -> FeatureSet:
    options = {"top": 2, "rank_by": "difference", "curve": CURVE, "benign": BENIGN}
    return find_repetition_features(model, tokenizer, saes, looping_prompts(), loops=loops, **options)


def test_the_feature_of_the_loop_comes_first(found, saes, model, loops):
    ranking = Table(**found.provenance["ranking"])
    assert ranking.columns[-3:] == ("fires in loop", "fires in normal", "fires in benign")
    for layer in saes:
        first = next(row for row in ranking.rows if row[0] == layer)
        assert first[1] == f"loop #{SHARE}"
        assert first[2] == pytest.approx(float(repetition_differences(model, loops.loops, saes)[layer][SHARE]))
        assert first[4] == 1.0
        assert first[5] == 0.0
        assert first[6] == pytest.approx(7 / 10)  # all but the first token of the circle, none of the words


def test_scores_and_effects_of_the_rows(found, saes, model, loops):
    gradients = repetition_gradients(model, loops.loops, [0, 1])
    for layer, rows in found.layers.items():
        ids = rows.feature_ids
        assert set(rows.labels) == {"loop"}
        rises = repetition_differences(model, loops.loops, saes)[layer]
        torch.testing.assert_close(rows.scores, rises[ids].float())
        torch.testing.assert_close(rows.effects.double(), saes[layer].W_dec[ids].double() @ gradients[layer])


def test_classes_hold_the_tokens_they_should(found, loops):
    assert found.languages == ("loop", "normal", "benign")
    tail = sum(len(loop.completion_ids) - loop.tail.second_copy for loop in loops.loops)
    normal = sum(len(entry.completion_ids) for entry in loops.normal)
    for rows in found.layers.values():
        assert rows.tokens.tolist() == [tail, normal, 7 + 3]


def test_it_steers_as_chosen(found, model, tokenizer):
    """feature_steering with nothing but the set reproduces the looped share of the curve."""
    chosen = found.settings["steering"]
    assert chosen["specific"] is True
    assert chosen["looped"] > chosen["random"] + 0.2
    assert chosen["samples"] == 50
    assert chosen["periods"] == [2, 8]
    assert chosen["own_looped"] == chosen["looped"]  # circles of four are all that this model knows
    layer = found.layers[chosen["layer"]]
    window = Window(chosen["window_start"][0], chosen["window_length"])
    steering = feature_steering(found, positions=window)
    direction = unit(unit(layer.decoder).sum(0))
    torch.testing.assert_close(steering.direction, direction)
    assert (steering.layers, steering.strength, steering.unit) == ((chosen["layer"],), 1.0, "relative")
    ids = encode_prompts(tokenizer, looping_prompts()) * 3
    with steer(model, steering):
        responses = sample_batch(model, tokenizer, ids, SAMPLING)
    share = sum(is_endless_repetition(tokens, ended=ended) for tokens, ended in responses) / len(ids)
    assert share == pytest.approx(chosen["looped"], abs=0.25)
    assert share > 0.4


def test_only_the_chosen_rows_of_the_chosen_layer_are_kept(found):
    table = Table(**found.provenance["steering_curve"])
    points = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    name = next(point["direction"] for point in points if point["chosen"] == "*" and point["stage"] == "scan")
    kept = found.layers[found.settings["steering"]["layer"]]
    assert name == " + ".join([kept.names[0], *(f"#{i}" for i in kept.feature_ids.tolist()[1:])])
    other = next(rows for layer, rows in found.layers.items() if layer != found.settings["steering"]["layer"])
    assert len(other) == 2


def test_it_can_be_saved_and_drawn(found, tmp_path):
    again = FeatureSet.load(found.save(tmp_path / "features.safetensors"))
    assert again.settings["steering"] == found.settings["steering"]
    assert again.provenance["loops"]["rate"] == found.provenance["loops"]["rate"]
    table = repetition_table(again)
    assert len(table.rows) == len(again)
    assert "minus its first" in again.to_table().caption
    figures = curve_figures(again)
    assert sorted(figures) == [0, 1]
    assert all("random (8 directions)" in svg and svg.startswith("<svg") for svg in figures.values())
    assert curve_figures(replace(again, provenance={})) == {}


def test_a_layer_at_a_time_gives_the_same(found, model, tokenizer, saes, loops):
    options = {"top": 2, "rank_by": "difference", "curve": None, "benign": BENIGN, "saes_at_once": 1}
    again = find_repetition_features(model, tokenizer, saes, loops=loops, **options)
    assert again.provenance["ranking"]["rows"] == found.provenance["ranking"]["rows"]
    assert "steering" not in again.settings


def test_loops_are_sampled_when_none_are_given(model, tokenizer, saes, capfd):
    options = {"top": 1, "rank_by": "difference", "curve": None}
    collect = {"wanted": 3, "max_samples": 200, "settings": SAMPLING}
    sampled = find_repetition_features(model, tokenizer, {0: saes[0]}, looping_prompts(), collect=collect, **options)
    assert sampled.layers[0].feature_ids.tolist() == [SHARE]
    assert sampled.provenance["loops"]["samples"] == 160
    assert sampled.languages == ("loop", "normal")


class TestNotSpecific:
    @pytest.fixture
    def idle(self, model, tokenizer, loops) -> FeatureSet:
        """One row along a dimension that the model never reads."""
        texts = {"loop": [loop.text() for loop in loops.loops], "normal": [entry.text() for entry in loops.normal]}
        passed = collect_statistics(model, tokenizer, texts, {0: None})
        direction = torch.eye(WIDTH)[WIDTH - 1 :]
        rows = features_from_directions(passed.layers[0], direction, ["idle"], "loop", 0)
        return feature_set_from(passed, {0: rows}, {})

    def test_it_is_said_and_recorded(self, idle, model, tokenizer, capfd):
        settings = replace(CURVE, strengths=(0.1,), fresh_samples=40)
        prompts = encode_prompts(tokenizer, looping_prompts())
        curve = steering_curve(model, tokenizer, prompts, idle, settings)
        found = with_choice(idle, curve)
        assert not curve.specific
        assert found.settings["steering"]["specific"] is False
        assert "warning: Not specific" in capfd.readouterr().err

    def test_nothing_is_chosen_where_nothing_loops(self, idle, model, tokenizer, capfd):
        settings = replace(CURVE, samples=4, min_copies=20)
        prompts = encode_prompts(tokenizer, looping_prompts())
        found = with_choice(idle, steering_curve(model, tokenizer, prompts, idle, settings))
        assert "steering" not in found.settings
        assert found.provenance["steering_curve"]["rows"]
        assert "nothing is chosen" in capfd.readouterr().err
        with pytest.raises(ValueError, match="find-repetition"):
            feature_steering(found)


def test_candidates_are_rows_and_sums(found, model, tokenizer, saes, loops):
    whole = find_repetition_features(model, tokenizer, {0: saes[0]}, loops=loops, top=4, curve=None)
    rows = whole.layers[0]
    pushes = list(candidates(0, rows, replace(CURVE, single_rows=2)))
    assert [push.rows for push in pushes] == [(0,), (1,), (0, 1), (0, 1, 2, 3)]
    for push in pushes:
        own = replace(whole, layers={0: rows.take(push.rows)})
        torch.testing.assert_close(push.vectors[0], feature_steering(own, layer=0, strength=1.0).direction)
        assert push.norm == rows.residual_median_norm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "Prompts are needed"),
        ({"curve": None}, "Prompts are needed"),
        ({"loops": "given"}, "Prompts are needed"),
        ({"loops": "without ordinary", "curve": None}, r"there are \d+ and 0"),
        ({"loops": "given", "curve": None, "saes_at_once": 0}, "saes_at_once"),
        ({"loops": "given", "curve": None, "top": 97}, "top must lie between 1 and"),
        ({"loops": "given", "curve": None, "rank_by": "magic"}, "rank_by"),
    ],
)
def test_wrong_arguments(changes, message, model, tokenizer, saes, loops):
    kinds = {"given": loops, "without ordinary": replace(loops, normal=())}
    arguments = {name: kinds.get(value, value) if name == "loops" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        find_repetition_features(model, tokenizer, saes, **arguments)
