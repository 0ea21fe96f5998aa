"""The repeat ratio, its table and files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qscope_posttrain.evaluation.repetition import (
    DEFAULT_SETTINGS,
    evaluate_repetition,
    repeat_ratio,
)
from qscope_posttrain.intervals import bootstrap_over_prompts, wilson
from qscope_posttrain.models.generation import Sample, SamplingSettings
from qscope_posttrain.text.repetition import RepeatedTail, is_endless_repetition, ngram_repetition_rate

LOOP = (9, *[1, 2, 3] * 4)
PLAIN = tuple(range(20, 40))


def make_samples(responses: dict[str, list[list[tuple[tuple[int, ...], bool]]]]) -> list[Sample]:
    """Samples from (token ids, ended) by language and prompt; a token is written as its number."""
    return [
        Sample(language, prompt, index, f"{language} {prompt}", " ".join(map(str, tokens)), ended, (1,), tokens)
        for language, by_prompt in responses.items()
        for prompt, group in enumerate(by_prompt)
        for index, (tokens, ended) in enumerate(group)
    ]


RESPONSES = {
    "en": [[(LOOP, False), (LOOP, True)], [(PLAIN, False), (PLAIN, True)], [(LOOP, False), (LOOP, False)]],
    "ko": [[((), True), ((5, 6), True)]],
}


def test_ratio_counts_loops_that_were_cut_off():
    result = repeat_ratio(make_samples(RESPONSES))
    english, korean = result.groups
    assert (english.prompts, english.samples, english.endless, english.ended, english.left) == (3, 6, 3, 2, 1)
    assert (korean.prompts, korean.samples, korean.endless, korean.ended, korean.left) == (1, 2, 0, 2, 0)
    assert english.wilson == wilson(3, 6)
    assert english.bootstrap == bootstrap_over_prompts([[1, 0], [0, 0], [1, 1]])
    assert result.ratio == 3 / 8
    assert result.total.wilson == wilson(3, 8)
    assert result.total.bootstrap == bootstrap_over_prompts([[1, 0], [0, 0], [1, 1], [0, 0]])
    assert result.tails == (*[RepeatedTail(1, 3, 4)] * 2, None, None, *[RepeatedTail(1, 3, 4)] * 2, None, None)


def test_means_over_responses():
    english, korean = repeat_ratio(make_samples(RESPONSES)).groups
    assert english.tokens == pytest.approx((4 * 13 + 2 * 20) / 6)
    assert korean.tokens == 1
    assert english.ngram_rate == pytest.approx(4 * ngram_repetition_rate(LOOP) / 6)
    assert korean.ngram_rate == 0
    assert english.compression > korean.compression > 0


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=20), st.booleans()), min_size=1, max_size=5))
def test_agrees_with_the_detector(responses):
    samples = make_samples({str(i): [[(tuple(tokens), ended)]] for i, (tokens, ended) in enumerate(responses)})
    result = repeat_ratio(samples, min_copies=3, min_tokens=6)
    expected = [is_endless_repetition(t, ended=e, min_copies=3, min_tokens=6) for t, e in responses]
    assert [bool(group.endless) for group in result.groups] == expected
    assert result.ratio == pytest.approx(np.mean(expected))


def test_what_counts_as_a_loop_can_be_set():
    samples = make_samples(RESPONSES)
    assert repeat_ratio(samples, min_copies=5).ratio == 0
    assert repeat_ratio(samples, min_tokens=13).ratio == 0
    assert repeat_ratio(samples, min_copies=2, min_tokens=2).ratio == 3 / 8


def test_order_of_samples_does_not_matter():
    samples = make_samples(RESPONSES)
    shuffled = [samples[i] for i in (0, 1, 5, 4, 3, 2, 7, 6)]
    assert {g.name: g.endless for g in repeat_ratio(shuffled).groups} == {"en": 3, "ko": 0}


def test_table_and_dict():
    result = repeat_ratio(make_samples(RESPONSES), settings={"temperature": 1.0, "max_new_tokens": 64})
    table = result.to_table()
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == ["en", "ko", "all"]
    assert rows["all"][1:4] == (4, 8, pytest.approx(37.5))
    assert rows["all"][4:6] == (pytest.approx(100 * wilson(3, 8).low), pytest.approx(100 * wilson(3, 8).high))
    for setting in ("temperature 1.0", "max_new_tokens 64", "min_copies 4", "min_tokens 12", "only in their seed"):
        assert setting in table.caption
    content = json.loads(json.dumps(result.to_dict()))
    assert content["ratio"] == content["wilson"]["estimate"] == 3 / 8
    assert content["groups"]["en"]["bootstrap"]["estimate"] == 0.5
    assert content["settings"]["min_copies"] == 4


def test_one_group_is_one_row():
    result = repeat_ratio(make_samples({"all": RESPONSES["en"]}))
    assert [row[0] for row in result.to_table().rows] == ["all"]
    assert replace(result.groups[0], name="all") == result.total


def test_examples_file(tmp_path, tiny_tokenizer):
    result = repeat_ratio(make_samples(RESPONSES))
    path = result.write_examples(tmp_path / "examples.jsonl", tiny_tokenizer)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 8
    block = tiny_tokenizer.decode([1, 2, 3])
    assert lines[1] == {
        "language": "en",
        "prompt_index": 0,
        "sample_index": 1,
        "prompt": "en 0",
        "response": "9 1 2 3 1 2 3 1 2 3 1 2 3",
        "ended": True,
        "tokens": 13,
        "endless": False,
        "loop": {"start": 1, "period": 3, "copies": 4, "block": block},
    }
    assert [line["endless"] for line in lines] == [True, False, False, False, True, True, False, False]
    assert lines[2]["loop"] is None
    result.write_examples(path)
    assert json.loads(path.read_text().splitlines()[0])["loop"] == {"start": 1, "period": 3, "copies": 4}


def test_evaluate_end_to_end(make_model, tiny_tokenizer, texts):
    """A model that says nothing but one token loops always; one that draws from all of them, or ends, never."""
    model = make_model()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(512))
    settings = SamplingSettings(samples_per_prompt=3, max_new_tokens=24, top_p=1.0, seed=5)
    prompts = {language: texts[language][:2] for language in ("en", "ru")}

    def evaluate(prompts, token=None, **options):
        with torch.no_grad():
            model.lm_head.bias.zero_()
            if token is not None:
                model.lm_head.bias[token] = 50
        return evaluate_repetition(model, tiny_tokenizer, prompts, settings, **options)

    stuck = evaluate(prompts, token=100)
    assert stuck.ratio == 1
    assert stuck.total.ngram_rate == pytest.approx(21 / 22)
    assert set(stuck.tails) == {RepeatedTail(0, 1, 24)}
    assert [group.name for group in stuck.groups] == ["en", "ru"]
    assert stuck.settings == {**settings.to_dict(), "chat": False, "min_copies": 4, "min_tokens": 12}
    ended = evaluate(prompts, token=tiny_tokenizer.eos_token_id)
    assert (ended.ratio, ended.total.tokens, ended.total.ended) == (0, 0, 12)
    free = evaluate(texts["en"], chat=True)
    assert free.ratio == 0
    assert (free.total.name, free.total.prompts, free.settings["chat"]) == ("all", 4, True)
    assert free.samples[0].prompt.startswith("<|im_start|>user\n")


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, ValueError, "No prompts for the source language 'all'"),
        ({}, {}, ValueError, "No prompts given"),
        ("text", {}, TypeError, "got one string"),
        (["a"], {"min_copies": 1}, ValueError, "min_copies=1"),
        (["a"], {"min_tokens": 2000}, ValueError, "max_new_tokens=1024 leaves no room"),
    ],
)
def test_wrong_use_is_refused_before_generating(tiny_tokenizer, prompts, options, error, message):
    with pytest.raises(error, match=message):
        evaluate_repetition(torch.nn.Identity(), tiny_tokenizer, prompts, DEFAULT_SETTINGS, **options)


def test_unusable_samples_are_refused():
    with pytest.raises(ValueError, match="No samples"):
        repeat_ratio([])
    with pytest.raises(ValueError, match=r"same number of samples; got \[1, 2\]"):
        repeat_ratio(make_samples({"en": [[(LOOP, False)], [(LOOP, False), (PLAIN, True)]]}))
    with pytest.raises(ValueError, match="no token ids"):
        repeat_ratio([Sample("en", 0, 0, "a", "b b b", False)])
