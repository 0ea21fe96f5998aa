"""ASR, RR and Acc by hand, on the report's table, and by brute force; the judge over HTTP; the command."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
from endpoint_server import serving
from word_world import write_world

from qscope_posttrain.cli.main import main
from qscope_posttrain.evaluation.safety import SafetyPrompt, Verdict, judge_responses, read_verdict
from qscope_posttrain.intervals import rate_difference, wilson


def judged(harmful, benign, group=""):
    """harmful: outcomes [prompts][samples] of attacks, benign: of refusals; None is undecided."""
    prompts = [SafetyPrompt(f"h{n}", True, group) for n in range(len(harmful))]
    prompts += [SafetyPrompt(f"b{n}", False, group) for n in range(len(benign))]
    outcomes = [*harmful, *benign]
    verdicts = [
        None if value is None else Verdict(refused=value != prompt.harmful, harmful=value and prompt.harmful)
        for prompt, values in zip(prompts, outcomes, strict=True)
        for value in values
    ]
    responses = [[f"r{n}" for n in range(len(values))] for values in outcomes]
    return judge_responses(prompts, responses, lambda pairs: verdicts)


def test_by_hand():
    result = judged([[True], [False], [False], [False]], [[True], [False]])
    assert result.attack_success().estimate == 0.25
    assert result.refusal_rate().estimate == 0.5
    assert result.accuracy().estimate == pytest.approx(1 - (0.25 + 0.5) / 2)
    assert result.accuracy().low < 0.625 < result.accuracy().high


@pytest.mark.parametrize(
    ("asr", "rr", "acc"),
    [(73.0, 3.5, 61.75), (22.0, 34.5, 71.75), (16.5, 43.0, 70.25), (21.0, 21.5, 78.75), (24.0, 20.5, 77.75)],
)
def test_the_report_s_table_is_reproduced_from_its_counts(asr, rr, acc):
    """Table 3 of the report, with 200 prompts of each kind."""
    attacks, refusals = round(2 * asr), round(2 * rr)
    result = judged(
        [[n < attacks] for n in range(200)],
        [[n < refusals] for n in range(200)],
    )
    assert 100 * result.accuracy().estimate == pytest.approx(acc)
    assert result.to_table().rows[0][:3] == ("all", 200, 200)


def test_interval_of_acc_covers():
    """Share of 400 test sets of 60 + 60 prompts in which the interval holds the truth; nominal 0.95."""
    draw = random.Random(0)
    asr, rr = 0.2, 0.35
    inside = 0
    for _ in range(400):
        result = judged([[draw.random() < asr] for _ in range(60)], [[draw.random() < rr] for _ in range(60)])
        interval = result.accuracy()
        inside += interval.low <= 1 - (asr + rr) / 2 <= interval.high
    assert 0.92 <= inside / 400 <= 0.98


def test_several_samples_are_averaged_by_prompt():
    harmful = [[True, False], [False, False], [True, True]]
    benign = [[False, True], [None, False]]
    result = judged(harmful, benign)
    assert result.attack_success().estimate == pytest.approx((0.5 + 0 + 1) / 3)
    assert result.refusal_rate().estimate == pytest.approx((0.5 + 0) / 2)
    assert result.accuracy().estimate == pytest.approx(1 - (0.5 + 0.25) / 2)
    assert result.undecided == 1


@pytest.mark.parametrize(("attack", "refusal"), [(False, False), (True, False), (True, True)])
def test_several_samples_that_all_agree_leave_an_interval(attack, refusal):
    """Resampling prompts that agree finds no spread: the interval is that of one outcome a prompt."""
    several = judged([[attack] * 3] * 10, [[refusal] * 3] * 8)
    single = judged([[attack]] * 10, [[refusal]] * 8)
    assert several.attack_success() == single.attack_success() == wilson(10 * attack, 10)
    assert several.refusal_rate() == single.refusal_rate() == wilson(8 * refusal, 8)
    assert several.accuracy() == single.accuracy()
    assert several.accuracy().low < several.accuracy().high
    assert "all prompts agree" in several.to_table().caption
    assert "Wilson" in single.to_table().caption


def test_where_one_kind_agrees_its_uncertainty_stays_in_acc():
    benign = [[True, False], [False, False], [True, True], [False, True]]
    found = judged([[False, False]] * 5, benign)
    rates = found.attack_success(), found.refusal_rate()
    assert rates[0] == wilson(0, 5)
    accuracy = found.accuracy()
    assert accuracy.estimate == pytest.approx(1 - rates[1].estimate / 2)
    assert accuracy.low == pytest.approx(
        accuracy.estimate - math.hypot(rates[0].high, rates[1].high - rates[1].estimate) / 2
    )
    assert accuracy.high == pytest.approx(accuracy.estimate + (rates[1].estimate - rates[1].low) / 2)


def test_prompts_that_agree_on_a_half():
    """Five prompts, each with one attack of two: between two and three successes of five."""
    found = judged([[True, False]] * 5, []).attack_success()
    assert found == (0.5, wilson(2, 5).low, wilson(3, 5).high)


def test_newcombe_s_interval_is_that_of_a_difference():
    result = judged([[n < 3] for n in range(10)], [[n < 2] for n in range(7)])
    difference = rate_difference((3, 10), (5, 7))
    expected = [1 - (value + 1) / 2 for value in (difference.estimate, difference.high, difference.low)]
    assert list(result.accuracy()) == pytest.approx(expected)


def test_every_small_table_by_brute_force():
    for outcomes in itertools.product([True, False, None], repeat=4):
        result = judged([[value] for value in outcomes[:2]], [[value] for value in outcomes[2:]])
        rates = []
        for part in (outcomes[:2], outcomes[2:]):
            known = [value for value in part if value is not None]
            rates.append(sum(known) / len(known) if known else None)
        found = [result.attack_success(), result.refusal_rate()]
        assert [None if rate is None else rate.estimate for rate in found] == rates
        if None in rates:
            assert result.accuracy() is None
        else:
            assert result.accuracy().estimate == pytest.approx(1 - sum(rates) / 2)
        assert result.undecided == outcomes.count(None)


def test_groups_and_mistakes():
    first = judged([[True]], [[False]], "vanilla")
    assert [row[0] for row in first.to_table().rows] == ["all", "vanilla"]
    assert judged([[True]], []).accuracy() is None
    with pytest.raises(ValueError, match="expected a response"):
        judge_responses([SafetyPrompt("a", True)], [[]], lambda pairs: [])
    assert read_verdict('So {"refused": true, "harmful": false}') == Verdict(True, False)
    for text in ('{"refused": true}', '{"refused": 1, "harmful": 0}', "no", "[true, false]"):
        with pytest.raises(ValueError):
            read_verdict(text)


def test_command(tmp_path):
    """The world's model answers with whatever words; the judge goes by the prompt, and cannot be read now and then."""
    world = write_world(tmp_path)
    rows = [{"prompt": f"unsafe ladder {n}", "harmful": True, "group": "vanilla"} for n in range(6)]
    rows += [{"prompt": f"tell me about soup {n}", "harmful": False, "group": "adversarial"} for n in range(5)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def judge(body):
        content = body["messages"][-1]["content"]
        if "soup 4" in content:
            return "hard to say"
        return json.dumps({"refused": "soup 1" in content, "harmful": "ladder 2" in content or "ladder 3" in content})

    with serving(judge, [("status", (429, {"Retry-After": "0.01"}))]) as server:
        command = [
            "evaluate", "safety", "--model", str(world / "model"), "--prompts", str(tmp_path / "test.jsonl"),
            "--output", str(tmp_path / "out"), "--max-new-tokens", "4", "--device", "cpu", "--chat-model", "judge",
            "--base-url", server.url,
        ]  # fmt: skip
        assert main(command) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]
    assert found["asr"]["estimate"] == pytest.approx(2 / 6)
    assert found["refusal_rate"]["estimate"] == pytest.approx(1 / 4)
    assert found["accuracy"]["estimate"] == pytest.approx(1 - (2 / 6 + 1 / 4) / 2)
    assert found["undecided"] == 1
    assert found["usage"]["sent"] == 11 + 1 + 2  # one was refused, one was asked for three times
    examples = [json.loads(line) for line in (tmp_path / "out" / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == 11
    assert [entry["harmful"] for entry in examples if "ladder 2" in entry["prompt"]] == [True]


def test_responses_are_on_disk_before_the_judge_is_asked_and_a_refusal_is_no_verdict(tmp_path):
    """The first run meets a wrong key, the second a filter that refuses one of the requests."""
    world = write_world(tmp_path)
    rows = [{"prompt": f"unsafe ladder {n}", "harmful": n < 2} for n in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = tmp_path / "out" / "examples.jsonl"

    def read():
        return [json.loads(line) for line in examples.read_text().splitlines()]

    with serving(lambda body: json.dumps({"refused": False, "harmful": True})) as server:
        command = [
            "evaluate", "safety", "--model", str(world / "model"), "--prompts", str(tmp_path / "test.jsonl"),
            "--output", str(tmp_path / "out"), "--max-new-tokens", "4", "--device", "cpu", "--chat-model", "judge",
            "--base-url", server.url, "--concurrency", "1",
        ]  # fmt: skip
        server.faults[:] = [("status", (401, {}))]
        assert main(command) == 2
        sampled = read()
        assert [entry["prompt"] for entry in sampled] == [row["prompt"] for row in rows]
        assert {entry["harmful"] for entry in sampled} == {None}
        server.faults[:] = [("ok", None), ("status", (400, {}, "content_filter"))]
        assert main(command) == 0
    assert [entry["response"] for entry in read()] == [entry["response"] for entry in sampled]
    assert [entry["harmful"] for entry in read()] == [True, None, True, True]
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]
    assert (found["undecided"], found["usage"]["refused"]) == (1, 1)
