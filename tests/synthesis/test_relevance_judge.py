"""The judge of relevance: what it does not say readably is counted, named, and never silently left out."""

from __future__ import annotations

import json

import pytest
from endpoint_server import serving
from word_world import COOKING, TOPIC, grammar

from qscope_posttrain.cli.main import main
from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.models import OpenAIChatModel
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.features.explain.explanation import Explanation, FeatureId
from qscope_posttrain.synthesis.coverage import judge_relevance
from qscope_posttrain.synthesis.pipeline import synthesis_templates

EXPLANATIONS = [
    Explanation(1, number, f"the word {word}", "") for number, word in enumerate(["ladder", "rung", "soup"])
]


def judged(tmp_path, reply, faults=()):
    with serving(reply, faults) as server, CompletionCache(tmp_path / "answers.jsonl") as cache:
        session = ChatSession(OpenAIChatModel("judge", server.url, concurrency=1), cache)
        return judge_relevance(session, synthesis_templates(), EXPLANATIONS, TOPIC)


def test_unreadable_and_refused_judgements_are_named(tmp_path):
    def reply(body):
        return "hard to say" if "rung" in body["messages"][-1]["content"] else '{"relevance": 0.7}'

    found = judged(tmp_path, reply, [("ok", None), ("ok", None), ("status", (400, {}, "content_filter"))])
    assert found[0] == {FeatureId(1, 0): 0.7}
    assert found[1] == (FeatureId(1, 1), FeatureId(1, 2))


def test_where_none_can_be_read_an_answer_is_quoted(tmp_path):
    with pytest.raises(ValueError, match=r"none of 3 features.*'relevance: 7 of 10'"):
        judged(tmp_path, lambda body: "relevance: 7 of 10")


def test_the_command_counts_them(arguments, tmp_path):
    def mumbling(body):
        rated = "You rate" in body["messages"][0]["content"]
        return "hm" if rated and "soup" in body["messages"][-1]["content"] else grammar(body)

    with serving(mumbling) as server:
        assert main(arguments(server, tmp_path, "--no-random-control")) == 0
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert len(results["relevance unreadable"]) == COOKING.count("soup") == 1
    assert results["rejected for their response"] == {}
    relevance = (tmp_path / "relevance.csv").read_text().splitlines()[1:]
    assert len(relevance) == 25


def test_responses_that_are_not_whole_are_counted(arguments, tmp_path):
    """Two answers of a finished run, as if a filter and the limit had ended them."""
    with serving(grammar) as server:
        assert main(arguments(server, tmp_path, "--no-random-control")) == 0
        answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    responses = [entry for entry in answers if entry["completion"]["text"] == "here is how to use it now"]
    responses[0]["completion"]["finish_reason"] = "content_filter"
    responses[1]["completion"]["finish_reason"] = "length"
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in answers))
    with serving(grammar) as server:
        assert main(arguments(server, tmp_path, "--no-random-control")) == 0
        assert not server.requests
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert results["rejected for their response"] == {"content_filter": 1, "length": 1}
