"""The switching ratio, its table and files, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from qscope_posttrain.evaluation.code_switching import (
    Sample,
    evaluate_code_switching,
    switching_ratio,
)
from qscope_posttrain.intervals import wilson
from qscope_posttrain.text.tokens import script_token_ids


def make_samples(responses: dict[str, list[list[str]]]) -> list[Sample]:
    return [
        Sample(language, prompt, index, f"{language} {prompt}", response, ended=index == 0)
        for language, by_prompt in responses.items()
        for prompt, group in enumerate(by_prompt)
        for index, response in enumerate(group)
    ]


RESPONSES = {
    "en": [["yes", "是"], ["no。", "No, 42!"], ["日本語です", "a 你 b"]],
    "ko": [["네", "좋은 中"]],
}


def test_ratio_is_the_share_of_responses_with_any_target_character():
    result = switching_ratio(make_samples(RESPONSES), "zh")
    english, korean = result.languages
    assert (english.language, english.prompts, english.samples, english.switched, english.ended) == ("en", 3, 6, 2, 3)
    assert (korean.switched, korean.samples) == (1, 2)
    assert english.wilson == wilson(2, 6)
    assert result.ratio == pytest.approx(3 / 8)
    assert result.micro_wilson == wilson(3, 8)
    assert result.macro.estimate == pytest.approx((2 / 6 + 1 / 2) / 2)
    assert result.outcomes.tolist() == [[False, True], [False, False], [False, True], [False, True]]
    for entry in (result.micro, result.macro, english.bootstrap):
        assert entry.low <= entry.estimate <= entry.high


def test_order_of_samples_does_not_matter():
    samples = make_samples(RESPONSES)
    result = switching_ratio(samples, "zh")
    shuffled = switching_ratio([samples[i] for i in (0, 1, 5, 4, 3, 2, 7, 6)], "zh")
    assert shuffled.languages == result.languages
    assert sorted(shuffled.outcomes.sum(axis=1)) == sorted(result.outcomes.sum(axis=1))


def test_seed_noise_is_the_spread_between_seeds():
    """Against simulation: fixed prompts of different difficulty, two seeds, many times."""
    generator = np.random.default_rng(0)
    rates = generator.beta(1, 3, size=60)

    def run() -> np.ndarray:
        return generator.random((60, 8)) < rates[:, None]

    differences = [run().mean() - run().mean() for _ in range(2000)]
    samples = [make_samples({"en": [["中" if hit else "x" for hit in row] for row in run()]}) for _ in range(5)]
    estimated = np.mean([switching_ratio(group, "zh").seed_noise for group in samples])
    assert estimated == pytest.approx(np.quantile(np.abs(differences), 0.95), rel=0.1)


def test_seed_noise_of_single_samples_is_that_of_a_coin():
    samples = make_samples({"en": [["中"], ["x"], ["x"], ["x"]]})
    assert switching_ratio(samples, "zh").seed_noise == pytest.approx(1.96 * (2 * 0.25 * 0.75 / 4) ** 0.5)


def test_table_and_dict():
    result = switching_ratio(make_samples(RESPONSES), "zh", settings={"temperature": 1.0, "seed": 3})
    table = result.to_table()
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == ["en", "ko", "all", "mean of languages"]
    assert rows["all"][1:4] == (4, 8, pytest.approx(37.5))
    assert rows["all"][-1] == pytest.approx(50.0)
    assert "temperature 1.0" in table.caption
    assert "differ only in their seed" in table.caption
    content = json.loads(json.dumps(result.to_dict()))
    assert content["ratio"] == pytest.approx(3 / 8)
    assert content["languages"]["en"]["wilson"]["low"] == pytest.approx(wilson(2, 6).low)
    assert content["settings"] == {"temperature": 1.0, "seed": 3}
    assert content["script"] == "Han"
    assert content["identification"] == {"by": "script", "script": "Han"}


def test_examples_file(tmp_path):
    result = switching_ratio(make_samples(RESPONSES), "zh")
    path = result.write_examples(tmp_path / "examples.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 8
    assert lines[1] == {
        "language": "en",
        "prompt_index": 0,
        "sample_index": 1,
        "prompt": "en 0",
        "response": "是",
        "ended": False,
        "switched": True,
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["examples.jsonl"]
    with pytest.raises(ValueError, match="cannot write"):
        result.write_examples(tmp_path / "missing" / "examples.jsonl")


def test_evaluate_end_to_end(make_model, tiny_tokenizer, texts):
    """A model that cannot write Han never switches, one that mostly can always does."""
    model = make_model()
    han = script_token_ids(tiny_tokenizer, "Han")
    prompts = {language: texts[language][:2] for language in ("en", "ru", "ko")}
    options = {"samples_per_prompt": 3, "max_new_tokens": 24, "top_p": 1.0, "seed": 5}
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(512))
    with torch.no_grad():
        model.lm_head.bias[han] = -100
        clean = evaluate_code_switching(model, tiny_tokenizer, prompts, "zh", **options)
        whole = [i for i in han.tolist() if "\ufffd" not in tiny_tokenizer.decode([i])]
        model.lm_head.bias[whole] = 10
        switching = evaluate_code_switching(model, tiny_tokenizer, prompts, "zh", **options)
    assert clean.ratio == 0
    assert clean.micro_wilson.high > 0.1
    assert switching.ratio == 1
    assert [entry.language for entry in switching.languages] == ["en", "ru", "ko"]
    assert switching.settings == {
        "samples_per_prompt": 3,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 24,
        "seed": 5,
        "batch_size": 32,
        "chat": False,
    }


@pytest.mark.parametrize(
    ("prompts", "target", "message"),
    [
        ({"en": ["a"], "ja": ["b"]}, "zh", "'ja' is itself written with Han"),
        ({"en": ["a"]}, "fr", "no script of its own"),
        ({"xx": ["a"]}, "zh", "Unknown language 'xx'"),
        ({}, "zh", "No prompts given"),
        ({"en": []}, "zh", "No prompts for the source language 'en'"),
    ],
)
def test_wrong_use_is_refused_before_generating(tiny_tokenizer, prompts, target, message):
    with pytest.raises(ValueError, match=message):
        evaluate_code_switching(torch.nn.Identity(), tiny_tokenizer, prompts, target)


def says_math(text: str, source: str) -> bool:
    if source not in ("docs", "en"):
        raise ValueError(f"no texts in {source!r}")
    return "apples" in text


class NamedDetector:
    """As a `SpanIdentifier`: with a name, settings, and a method that decides."""

    name = "words"

    def __init__(self, threshold: float = 2.0):
        self.threshold = threshold

    def __call__(self, text: str, source: str) -> bool:
        return says_math(text, source)

    def switched(self, text: str, source: str) -> bool:
        return says_math(text, source)

    def to_dict(self) -> dict[str, float]:
        return {"threshold": self.threshold}


WORD_PROBLEMS = {"docs": [["Tom has 3 apples.", "Call it."], ["中文", "apples"]]}


@pytest.mark.parametrize(
    ("detector", "identification"),
    [
        (says_math, {"by": "says_math"}),
        (NamedDetector(), {"by": "words", "threshold": 2.0}),
        (NamedDetector().switched, {"by": "words", "threshold": 2.0}),
    ],
)
def test_a_detector_decides_in_place_of_the_script(detector, identification):
    result = switching_ratio(make_samples(WORD_PROBLEMS), "math", {"seed": 3}, detector=detector)
    assert result.outcomes.tolist() == [[True, False], [False, True]]
    assert result.settings == {"seed": 3, "identified_by": identification["by"]}
    assert f"identified_by {identification['by']}" in result.note()
    content = json.loads(json.dumps(result.to_dict()))
    assert content["identification"] == identification
    assert content["script"] is None
    assert "switched to math, %" in result.to_table().columns


def test_evaluate_with_a_detector(make_model, tiny_tokenizer):
    met = []

    def every_second(text: str, source: str) -> bool:
        met.append((text, source))
        return bool(text) and len(met) % 2 == 0

    options = {"samples_per_prompt": 2, "max_new_tokens": 4, "top_p": 1.0}
    result = evaluate_code_switching(
        make_model(), tiny_tokenizer, {"en": ["We walk"], "fr": ["Nous"]}, "any name", detector=every_second, **options
    )
    assert met[:2] == [("", "en"), ("", "fr")]
    assert [text for text, _ in met[2:]] == [sample.response for sample in result.samples]
    assert result.settings["identified_by"] == "every_second"


@pytest.mark.parametrize(
    ("prompts", "detector", "message"),
    [
        ({"docs": ["a"], "ko": ["b"]}, says_math, "no texts in 'ko'"),
        ({"docs": ["a"]}, lambda text, source: True, "calls an empty response to a prompt in 'docs' switched"),
    ],
)
def test_a_detector_that_cannot_judge_is_refused_before_generating(tiny_tokenizer, prompts, detector, message):
    with pytest.raises(ValueError, match=message):
        evaluate_code_switching(torch.nn.Identity(), tiny_tokenizer, prompts, "math", detector=detector)


def test_unequal_or_missing_samples_are_refused():
    with pytest.raises(ValueError, match="No samples"):
        switching_ratio([], "zh")
    with pytest.raises(ValueError, match=r"same number of samples; got \[1, 2\]"):
        switching_ratio(make_samples({"en": [["a"], ["b", "c"]]}), "zh")
