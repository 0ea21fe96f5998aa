"""Requests that an endpoint refuses for good: an outcome where others are answered, an error where none is."""

from __future__ import annotations

import json

import pytest
from endpoint_server import serving

from qscope_posttrain.endpoint.cache import FIRST_FEW, CompletionCache
from qscope_posttrain.endpoint.chat import ChatCompletion, ChatRequest, Message, RequestFailed, RequestRefused, Sampling
from qscope_posttrain.endpoint.models import OpenAIChatModel
from qscope_posttrain.endpoint.session import ChatSession, Limits

WARM, COLD = Sampling(max_tokens=9), Sampling(temperature=0.0, max_tokens=9)
REFUSED = ("status", (400, {}))
FILTERED = ("status", (400, {}, "content_filter"))
OK = ("ok", None)


def ask(text: str, sampling: Sampling = WARM) -> ChatRequest:
    return ChatRequest((Message("user", text),), sampling)


def asked(server) -> list[str]:
    return [body["messages"][-1]["content"] for body in server.requests]


@pytest.fixture
def open_session(tmp_path):
    """open_session(server, **options): a session over tmp_path/answers.jsonl, as a new process would open it."""
    caches = []

    def make(server, ask_refused_again=False, **options):
        while caches:
            caches.pop().close()
        caches.append(CompletionCache(tmp_path / "answers.jsonl", ask_refused_again=ask_refused_again))
        model = OpenAIChatModel("m", server.url, **{"concurrency": 1, **options})
        return ChatSession(model, caches[0], limits=Limits(attempts=2))

    yield make
    for cache in caches:
        cache.close()


@pytest.mark.parametrize(("code", "place"), [(400, 0), (400, 1), (413, 2), (422, 1)])
def test_a_refusal_among_answers_is_an_outcome_and_is_not_asked_again(open_session, code, place):
    faults = [OK] * 3
    faults[place] = ("status", (code, {}))
    with serving(lambda body: "yes", faults) as server:
        session = open_session(server)
        requests = [ask("a"), ask("b"), ask("c")]
        found = session.complete(requests)
        assert [completion.text for completion in found] == ["" if n == place else "yes" for n in range(3)]
        assert f"status {code}" in found[place].refusal
        assert found[place].finish_reason == "refused"
        assert not found[place].whole
        assert (session.usage.sent, session.usage.failed, session.usage.refused) == (3, 0, 1)
        assert "told to fail" in session.usage.first_refusal
        again = open_session(server)
        assert again.complete(requests) == found
        assert (again.usage.sent, again.usage.cached, again.usage.refused) == (0, 3, 1)
        assert len(server.requests) == 3
        assert [entry.text for entry in open_session(server, ask_refused_again=True).complete(requests)] == ["yes"] * 3
        assert [entry.text for entry in open_session(server).complete(requests)] == ["yes"] * 3
        assert len(server.requests) == 4


def test_a_refused_request_has_no_value_and_no_further_draw(open_session):
    with serving(lambda body: "1", [OK, FILTERED]) as server:
        answers = open_session(server).complete_parsed([ask("a"), ask("b")], json.loads)
        assert [answer.value for answer in answers] == [1, None]
        assert answers[1].completion.refusal
        assert len(server.requests) == 2


def test_where_the_first_few_are_all_refused_the_endpoint_is_quoted_and_nothing_is_kept(open_session, tmp_path):
    requests = [ask(str(n)) for n in range(50)]
    with serving(lambda body: "yes", [REFUSED] * 50) as server:
        with pytest.raises(RequestFailed, match=r"status 400: .*told to fail") as caught:
            open_session(server).complete(requests)
        assert "--max-tokens-name" in str(caught.value)
        assert len(server.requests) == FIRST_FEW
        assert (tmp_path / "answers.jsonl").read_bytes() == b""
        server.faults.clear()
        session = open_session(server, max_tokens_name="max_completion_tokens")
        assert {completion.text for completion in session.complete(requests)} == {"yes"}


def test_where_every_request_is_refused_nothing_is_kept(open_session, tmp_path):
    for fault in (REFUSED, FILTERED):
        with serving(lambda body: "yes", [fault] * 2) as server:
            with pytest.raises(RequestFailed, match="refused all of 2 requests"):
                open_session(server).complete([ask("a"), ask("b")])
            assert (tmp_path / "answers.jsonl").read_bytes() == b""


def test_words_that_a_filter_names_never_speak_against_the_options(open_session):
    """A test set that begins with its harmful prompts, before a strict endpoint."""
    count = FIRST_FEW + 5
    with serving(lambda body: "yes", [FILTERED] * count) as server:
        session = open_session(server)
        found = session.complete([ask(str(n)) for n in range(count + 1)])
        assert [bool(completion.refusal) for completion in found] == [True] * count + [False]
        assert open_session(server).complete([ask("0")])[0].refusal
        assert len(server.requests) == count + 1


def test_answers_of_another_temperature_say_nothing(open_session):
    """A model that takes temperature 1 alone: what is asked at another must not be taken for refused by its words."""
    with serving(lambda body: "yes", [OK, REFUSED, REFUSED]) as server:
        session = open_session(server)
        session.complete([ask("a", WARM)])
        with pytest.raises(RequestFailed, match="none like them"):
            session.complete([ask("a", COLD), ask("b", COLD)])
        assert len(open_session(server).cache) == 1


def test_one_refusal_left_over_is_an_outcome_in_a_later_run_too(open_session):
    """The endpoint answered such requests before, which is on file."""
    with serving(lambda body: "yes", [OK, REFUSED]) as server:
        open_session(server).complete([ask("a")])
        assert open_session(server).complete([ask("b")])[0].refusal
        assert open_session(server).complete([ask("b")])[0].refusal
        assert asked(server) == ["a", "b"]


def test_another_server_is_asked_for_what_one_refused(open_session):
    with serving(lambda body: "yes", [OK, REFUSED]) as server:
        assert open_session(server).complete([ask("a"), ask("b")])[1].refusal
    with serving(lambda body: "yes") as other:
        assert [entry.text for entry in open_session(other).complete([ask("a"), ask("b")])] == ["yes", "yes"]
        assert asked(other) == ["b"]


@pytest.mark.parametrize("fault", [401, 403, 404, (400, "insufficient_quota"), (400, "invalid_api_key")])
def test_what_concerns_all_requests_still_ends_the_run(open_session, fault):
    code, *name = fault if isinstance(fault, tuple) else (fault,)
    with serving(lambda body: "yes", [OK, ("status", (code, {}, *name))]) as server:
        session = open_session(server)
        with pytest.raises(RequestFailed, match=f"status {code}"):
            session.complete([ask("a"), ask("b"), ask("c")])
        assert asked(server) == ["a", "b"]
        assert len(session.cache) == 1


def test_in_a_batch_only_the_refused_one_is_without_an_answer(tmp_path):
    class Batches:
        batch_size, concurrency, identity, route = 4, 1, {"name": "batches"}, {}

        def complete(self, requests):
            if any("long" in request.messages[0].content for request in requests):
                raise RequestRefused("too long", content=True)
            return [ChatCompletion("yes", "stop", 1, 1, "") for _ in requests]

    with CompletionCache(tmp_path / "answers.jsonl") as cache:
        found = ChatSession(Batches(), cache).complete([ask("a"), ask("long"), ask("b")])
        assert [completion.text for completion in found] == ["yes", "", "yes"]
        assert len(cache) == 3
