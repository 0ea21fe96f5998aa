"""Loops sampled from a model that loops by construction, and loops among given texts."""

from __future__ import annotations

import json

import pytest
from looping_model import CIRCLE, ORDINARY, looping_model, looping_prompts, looping_tokenizer

from qscope_posttrain.features.find.loops import Completion, Loop, LoopCollection, collect_loops, loops_from_texts
from qscope_posttrain.intervals import wilson
from qscope_posttrain.models.generation import SamplingSettings
from qscope_posttrain.text.repetition import RepeatedTail

SETTINGS = SamplingSettings(top_p=1.0, max_new_tokens=32, batch_size=64)


@pytest.fixture(scope="module")
def collection() -> LoopCollection:
    return collect_loops(looping_model(), looping_tokenizer(), looping_prompts(), wanted=5, settings=SETTINGS)


def test_loops_run_to_the_limit_in_the_circle(collection):
    assert len(collection.loops) >= 5
    for loop in collection.loops:
        assert len(loop.completion_ids) == SETTINGS.max_new_tokens
        assert loop.tail.period == 4
        assert set(loop.completion_ids[loop.tail.start :]) == set(CIRCLE)
        assert set(loop.completion_ids[: loop.tail.start]) <= set(ORDINARY)
        assert loop.text().ids == loop.prompt_ids + loop.completion_ids
        assert loop.text().start == 3 + loop.tail.start + 4


def test_ordinary_completions_ended_by_themselves(collection):
    assert 4 <= len(collection.normal) <= 20
    for entry in collection.normal:
        assert 0 < len(entry.completion_ids) < SETTINGS.max_new_tokens
        assert entry.text().start == len(entry.prompt_ids) == 3
        assert not isinstance(entry, Loop)


def test_rate_and_how_it_was_sampled(collection):
    assert collection.samples % SETTINGS.batch_size == 0
    assert collection.rate == wilson(len(collection.loops), collection.samples)
    assert collection.settings["max_new_tokens"] == 32
    assert f"{len(collection.loops)} endless repetitions in {collection.samples} samples" in collection.summary()


@pytest.mark.parametrize(
    ("periods", "expected"),
    [
        ([7], (4, 14)),
        ([1, 6, 8], (1, 16)),  # too few to call one of them odd
        ([1] + [8] * 10 + [13] * 8 + [90], (4, 26)),
        ([1] * 5 + [12] * 15, (1, 24)),  # a fifth is a habit
    ],
)
def test_periods_like_those_of_the_loops(periods, expected):
    loops = tuple(Loop((1,), tuple(range(period)) * 4, RepeatedTail(0, period, 4)) for period in periods)
    assert LoopCollection(loops, (), 100).periods == expected


def test_the_same_settings_find_the_same_loops(collection):
    again = collect_loops(looping_model(), looping_tokenizer(), looping_prompts(), wanted=5, settings=SETTINGS)
    assert again == collection
    assert collection.loops[0] != collection.loops[1]


def test_too_few_loops_are_reported_and_none_is_an_error(capfd):
    model, tokenizer, prompts = looping_model(), looping_tokenizer(), looping_prompts()
    found = collect_loops(model, tokenizer, prompts, wanted=50, max_samples=70, settings=SETTINGS)
    assert found.samples == 70
    assert 0 < len(found.loops) < 50
    assert f"only {len(found.loops)} endless repetitions in 70 samples" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"0 endless repetitions in 16 samples \(0.000%, 95 % 0.000% .. 19"):
        collect_loops(model, tokenizer, prompts, max_samples=16, min_copies=20, settings=SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prompts": []}, "at least one"), ({"wanted": 0}, "at least 1"), ({"max_samples": 0}, "at least 1")],
)
def test_wrong_arguments(changes, message):
    arguments = {"prompts": ["w0"], "wanted": 1, "max_samples": 1, **changes}
    with pytest.raises(ValueError, match=message):
        collect_loops(looping_model(), looping_tokenizer(), settings=SETTINGS, **arguments)


def test_given_texts_in_all_forms_are_the_same():
    tokenizer = looping_tokenizer()
    prompt, completion = "w1 w2", "w3 c0 c1 c2 " * 5
    rows = [
        {"prompt": prompt, "completion": completion},
        {"prompt_ids": tokenizer(prompt)["input_ids"], "completion_ids": tokenizer(completion)["input_ids"]},
        {"prompt": prompt, "completion": completion, "ended": False},
        {"prompt": prompt, "response": completion, "ended": False, "tokens": 20},  # of `qscope evaluate repetition`
    ]
    found = loops_from_texts(tokenizer, [*rows, f"{prompt} {completion}", {"text": f"{prompt} {completion}"}])
    assert len(found.loops) == found.samples == 6
    assert len(set(found.loops[:4])) == len(set(found.loops[4:])) == 1
    assert found.loops[0].tail == RepeatedTail(0, 4, 5)
    assert found.loops[4].tail == RepeatedTail(2, 4, 5)
    assert found.rate is None
    assert "6 endless repetitions in 6 given texts, 0 ordinary" in found.summary()


def test_what_counts_as_ordinary_among_given_texts():
    loop, plain = "c0 c1 c2 c3 " * 4, "w0 w1 w2"
    rows = [loop, {"text": loop, "ended": True}, plain, {"text": plain, "ended": True}, {"text": plain, "ended": False}]
    found = loops_from_texts(looping_tokenizer(), rows)
    assert (len(found.loops), len(found.normal), found.samples) == (1, 2, 5)
    with pytest.raises(ValueError, match=r"0 endless repetitions in 2 given texts.*at least 4 copies"):
        loops_from_texts(looping_tokenizer(), rows[1:3])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"prompt": "w0"}, ValueError, "it has prompt"),
        ({}, ValueError, "it has nothing"),
        (5, TypeError, "Text 1 must be a string or a mapping, got int"),
        ({"completion_ids": "w0"}, TypeError, "must be a list of token ids"),
        ({"completion_ids": [1, "w0"]}, TypeError, "must be a list of token ids"),
    ],
)
def test_wrong_texts(wrong, error, message):
    with pytest.raises(error, match=message):
        loops_from_texts(looping_tokenizer(), [wrong])


def test_written_loops_are_read_again(collection, tmp_path):
    path = collection.write(tmp_path / "loops.jsonl", looping_tokenizer())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    again = loops_from_texts(looping_tokenizer(), rows)
    assert again.loops == collection.loops
    assert again.normal == collection.normal
    assert "c0 c1 c2 c3 c0" in rows[0]["completion"]
    assert rows[0]["tail"]["period"] == 4


def test_the_text_of_a_loop_without_prompt_leaves_out_the_first_copy():
    loop = Loop((), (5, 6, 5, 6, 5, 6), RepeatedTail(0, 2, 3))
    assert loop.text().start == 2
    assert Completion((), (5, 6)).text().start == 1
