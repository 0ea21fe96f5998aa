"""Requests over HTTP to a real server on loopback: every way to fail, what is sent again, what is never asked twice."""

from __future__ import annotations

import json
import time

import pytest
from endpoint_server import serving

from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatRequest, Message, RequestFailed, Sampling
from qscope_posttrain.endpoint.models import OpenAIChatModel
from qscope_posttrain.endpoint.session import BudgetSpent, ChatSession, Limits

KEY = "sk-not-a-real-key-8f1d"
FAST = Limits(attempts=4)


def short(seconds: float) -> None:
    """Pause for a hundredth of the time."""
    time.sleep(seconds / 100)


def ask(text: str, sample: int = 0) -> ChatRequest:
    return ChatRequest((Message("system", "be brief"), Message("user", text)), Sampling(max_tokens=9), sample)


def echo(body) -> str:
    return f"{body['messages'][-1]['content']}!"


@pytest.fixture
def open_session(tmp_path, monkeypatch):
    """open_session(server, limits=None, **options of the model) -> ChatSession over tmp_path/answers.jsonl."""
    monkeypatch.setenv("TEST_KEY", KEY)
    caches = []

    def make(server, limits=FAST, sleep=short, **options):
        options = {"timeout": 0.5, "concurrency": 1, **options}
        cache = CompletionCache(tmp_path / "answers.jsonl")
        caches.append(cache)
        model = OpenAIChatModel("grammar", server.url, api_key_env="TEST_KEY", **options)
        return ChatSession(model, cache, limits=limits, sleep=sleep)

    yield make
    for cache in caches:
        cache.close()


def test_answers_in_order_and_once_for_equal_requests(open_session):
    with serving(echo) as server:
        session = open_session(server, concurrency=3)
        requests = [ask("a"), ask("b"), ask("a"), ask("a", sample=1)]
        found = session.complete(requests)
        assert [completion.text for completion in found] == ["a!", "b!", "a!", "a!"]
        assert len(server.requests) == 3
        assert server.requests[0]["messages"][0] == {"role": "system", "content": "be brief"}
        assert server.requests[0]["max_tokens"] == 9
        assert "seed" not in server.requests[0]
        assert found[0].prompt_tokens == 7
        assert session.usage.to_dict() == {
            "requests": 3, "sent": 3, "failed": 0, "refused": 0, "cached": 0, "tokens": 30,
            "prompt_tokens": 21, "completion_tokens": 9,
        }  # fmt: skip
        assert session.complete(requests) == found
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    "fault",
    [
        ("status", (500, {})),
        ("status", (503, {})),
        ("status", (429, {})),
        ("status", (408, {})),
        ("body", b'{"choices": [{"message": {"content": "cut o'),
        ("body", b"<html>gateway</html>"),
        ("body", b'{"error": "200 but no choices"}'),
        ("body", b'{"choices": [{"message": {"content": ["no", "text"]}}]}'),
        ("drop", None),
        ("slow", 0.7),
    ],
    ids=lambda fault: f"{fault[0]}-{fault[1]}",
)
def test_what_passes_is_sent_again(open_session, fault):
    with serving(echo, [fault, fault]) as server:
        session = open_session(server)
        assert session.complete([ask("a")])[0].text == "a!"
        assert len(server.requests) == 3
        assert (session.usage.sent, session.usage.failed) == (3, 2)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
def test_what_cannot_succeed_is_sent_once(open_session, code):
    with serving(echo, [("status", (code, {}))]) as server:
        session = open_session(server)
        with pytest.raises(RequestFailed, match=f"status {code}") as caught:
            session.complete([ask("a")])
        assert len(server.requests) == 1
        assert KEY not in str(caught.value)  # the server quoted it


def test_gives_up_after_the_last_attempt_and_keeps_the_others(open_session, tmp_path):
    with serving(echo, [("ok", None)] + [("status", (500, {}))] * 4) as server:
        session = open_session(server)
        with pytest.raises(RequestFailed, match="after 4 attempts"):
            session.complete([ask("a"), ask("b"), ask("c")])
        assert len(server.requests) == 5
        assert session.cache.get(ask("a").key(session.model.identity)).text == "a!"
        assert [found.text for found in session.complete([ask("a"), ask("b"), ask("c")])] == ["a!", "b!", "c!"]
        assert len(server.requests) == 7


def test_retry_after_is_obeyed_by_all(open_session):
    slept = []
    with serving(echo, [("status", (429, {"Retry-After": "7"}))]) as server:
        session = open_session(server, sleep=slept.append)
        session.complete([ask("a")])
        assert slept[0] == 7.0
        assert slept[1] == pytest.approx(7.0, abs=0.5)  # the pace was held too; `sleep` here takes no time
    with serving(echo, [("status", (429, {"Retry-After": "9999"}))]) as server:
        session = ChatSession(OpenAIChatModel("m", server.url), session.cache, sleep=slept.append)
        with pytest.raises(RequestFailed, match="status 429"):
            session.complete([ask("a")])
        assert len(server.requests) == 1


def test_an_exhausted_quota_is_not_waited_for(open_session):
    with serving(echo, [("status", (429, {}, "insufficient_quota"))]) as server:
        with pytest.raises(RequestFailed, match="status 429"):
            open_session(server).complete([ask("a")])
        assert len(server.requests) == 1


def test_a_failure_that_lasts_stops_the_others(open_session):
    """What is being tried again when one request cannot succeed is not tried to the end."""
    faults = [("status", (503, {})), ("status", (401, {}))] + [("status", (503, {}))] * 50
    with serving(echo, faults) as server:
        session = open_session(server, Limits(attempts=50), lambda seconds: time.sleep(0.2), concurrency=2)
        with pytest.raises(RequestFailed, match="status 401"):
            session.complete([ask(str(n)) for n in range(9)])
        assert len(server.requests) <= 4


def test_concurrency(open_session):
    with serving(echo, delay=0.05) as server:
        open_session(server, concurrency=4).complete([ask(str(n)) for n in range(12)])
        assert server.at_once == 4


def test_pace(open_session):
    slept = []
    with serving(echo) as server:
        session = open_session(server, Limits(requests_per_minute=120), sleep=slept.append)
        session.complete([ask(str(n)) for n in range(4)])
        assert slept == pytest.approx([0.5, 1.0, 1.5], abs=0.2)  # from now on, since `sleep` here takes no time


def test_budget_of_requests_counts_attempts_and_cached_answers(open_session):
    requests = [ask(str(n)) for n in range(5)]
    with serving(echo, [("status", (500, {}))]) as server:
        session = open_session(server, Limits(max_requests=4))
        with pytest.raises(BudgetSpent, match="max_requests=4"):
            session.complete(requests)
        assert len(server.requests) == 4
        assert len(session.cache) == 3
        fresh = ChatSession(session.model, session.cache, limits=Limits(max_requests=4), sleep=short)
        with pytest.raises(BudgetSpent):
            fresh.complete(requests)
        assert len(server.requests) == 5
        assert fresh.usage.to_dict()["cached"] == 3


def test_budget_of_tokens(open_session):
    with serving(echo) as server:
        session = open_session(server, Limits(max_tokens=25))
        with pytest.raises(BudgetSpent, match="max_tokens=25"):
            session.complete([ask(str(n)) for n in range(9)])
        assert len(server.requests) == 3  # 10 tokens each: the third starts at 20 and ends at 30


def test_a_finished_run_can_be_repeated_whatever_it_used(open_session):
    """Two requests under way overstep the budget together; asked again, all their answers are there."""
    with serving(echo, delay=0.05) as server:
        session = open_session(server, Limits(max_tokens=15), concurrency=2)
        requests = [ask("a"), ask("b")]
        found = session.complete(requests)
        assert session.usage.tokens == 20
        again = ChatSession(session.model, session.cache, limits=Limits(max_requests=1, max_tokens=15))
        assert again.complete(requests) == found
        assert again.usage.to_dict()["cached"] == 2
        with pytest.raises(BudgetSpent):
            again.complete([ask("c")])
        assert len(server.requests) == 2


def test_an_answer_that_cannot_be_read_is_drawn_again(open_session):
    def moody(body) -> str:
        return json.dumps({"score": 0.5}) if body["seed"] % 3 == 2 or "easy" in body["messages"][-1]["content"] else "x"

    def read(text):
        return json.loads(text)["score"]

    with serving(moody) as server:
        session = open_session(server, send_seed=True)
        answers = session.complete_parsed([ask("easy"), ask("hard"), ask("hard", sample=1)], read)
        assert [answer.value for answer in answers] == [0.5, 0.5, 0.5]
        assert [body["seed"] for body in server.requests] == [0, 0, 3, 1, 4, 2, 5]
        again = session.complete_parsed([ask("easy"), ask("hard")], read, draws=3)
        assert [answer.value for answer in again] == [0.5, 0.5]
        assert len(server.requests) == 7  # answers that could not be read were paid for, and are kept too
        assert session.complete_parsed([ask("hard")], json.loads, draws=1)[0].value is None


@pytest.mark.promise("A key goes to the server that the user named: it is in no file, no message and no log")
def test_the_key_goes_to_the_endpoint_and_nowhere_else(open_session, tmp_path, capfd):
    with serving(echo) as server:
        session = open_session(server)
        session.complete([ask("a")])
        assert server.keys == {f"Bearer {KEY}"}
    session.cache.close()
    for path in tmp_path.rglob("*"):
        assert KEY.encode() not in path.read_bytes()
    assert KEY not in "".join(capfd.readouterr())
    assert KEY not in repr(session.model.identity)


def test_options_go_with_every_request_and_into_the_key(open_session):
    with serving(echo) as server:
        session = open_session(server, options={"reasoning_effort": "low"}, max_tokens_name="max_completion_tokens")
        session.complete([ask("a")])
        assert server.requests[0]["reasoning_effort"] == "low"
        assert server.requests[0]["max_completion_tokens"] == 9
        plain = OpenAIChatModel("grammar", server.url)
        assert ask("a").key(plain.identity) != ask("a").key(session.model.identity)
        moved = OpenAIChatModel("grammar", "http://127.0.0.1:9/v1")
        assert ask("a").key(plain.identity) == ask("a").key(moved.identity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "ftp://x/v1"}, "http"),
        ({"base_url": "http://user:secret@x/v1"}, "no key"),
        ({"base_url": "http://x/v1?key=secret"}, "no key"),
        ({"base_url": "http://x/v1", "concurrency": 0}, "positive"),
        ({"base_url": "http://x/v1", "max_tokens_name": "tokens"}, "max_tokens"),
        ({}, "UNSET_KEY"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        OpenAIChatModel("m", **options, api_key_env="UNSET_KEY")
    assert "secret" not in str(caught.value)
