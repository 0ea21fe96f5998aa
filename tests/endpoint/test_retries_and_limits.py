"""Pauses between attempts, the header Retry-After, and reading answers: no server needed."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope_posttrain.endpoint.chat import (
    Message,
    PromptTemplates,
    RequestFailed,
    Sampling,
    number_field,
    read_json,
    text_field,
    truth_field,
)
from qscope_posttrain.endpoint.models import retry_after_seconds
from qscope_posttrain.endpoint.session import Limits


def test_pauses_double_up_to_the_longest():
    limits = Limits(attempts=9)
    failure = RequestFailed("x", retry=True)
    for attempt, full in enumerate([1, 2, 4, 8, 16, 32, 60, 60], start=1):
        pauses = [limits.pause(attempt, failure) for _ in range(50)]
        assert min(pauses) >= full / 2
        assert max(pauses) <= full
        assert len(set(pauses)) > 1
    assert limits.pause(9, failure) is None
    assert limits.pause(1, RequestFailed("x", retry=False)) is None
    assert limits.pause(1, RequestFailed("x", retry=True, retry_after=30)) == 30
    assert limits.pause(1, RequestFailed("x", retry=True, retry_after=301)) is None


def test_retry_after():
    assert retry_after_seconds("2.5") == 2.5
    assert retry_after_seconds("-3") == 0
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert retry_after_seconds(format_datetime(later, usegmt=True)) == pytest.approx(90, abs=2)
    assert [retry_after_seconds(value) for value in (None, "soon", "nan")] == [None, None, None]


@pytest.mark.parametrize(
    "settings", [{"max_requests": 0}, {"max_tokens": -1}, {"requests_per_minute": 0}, {"attempts": 0}]
)
def test_limits_are_positive(settings):
    with pytest.raises(ValueError, match="positive"):
        Limits(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(temperature=-1), "temperature"),
        (lambda: Sampling(top_p=0), "top_p"),
        (lambda: Sampling(max_tokens=0), "max_tokens"),
    ],
)
def test_mistakes_in_a_request(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_json_is_found_among_words():
    assert read_json('Sure! {"a": [1, 2]} Anything else?') == {"a": [1, 2]}
    assert read_json("```json\n[1, 0, 1]\n```") == [1, 0, 1]
    assert read_json('{broken} then {"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="no JSON"):
        read_json("yes")


@given(st.text())
def test_json_in_any_text_is_found_or_refused(text):
    with contextlib.suppress(ValueError):
        assert isinstance(read_json(text), dict | list)


def test_fields():
    assert number_field("score", 0, 1)('{"score": 1}') == 1.0
    assert truth_field("refused")('{"refused": false}') is False
    assert text_field("prompt")('{"prompt": " a "}') == "a"
    for read, text in [
        (number_field("score", 0, 1), '{"score": 1.5}'),
        (number_field("score", 0, 1), '{"score": true}'),
        (number_field("score", 0, 1), '{"score": NaN}'),
        (number_field("score", 0, 1), "[1]"),
        (truth_field("refused"), '{"refused": "yes"}'),
        (text_field("prompt"), '{"prompt": " "}'),
    ]:
        with pytest.raises(ValueError):
            read(text)


def test_templates(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    system, user = "{% block system %}Be {{ how }}.{% endblock %}", "{% block user %} {{ what }} {% endblock %}"
    (own / "ask.jinja").write_text(system + user)
    (own / "rest.jinja").write_text("{% block user %}rest{% endblock %}")
    assert PromptTemplates(own).messages("ask", how="kind", what="<b>") == (
        Message("system", "Be kind."),
        Message("user", "<b>"),
    )
    (other / "ask.jinja").write_text("{% block user %}Only {{ what }}{% endblock %}")
    mixed = PromptTemplates(own, other)
    assert mixed.messages("ask", how="kind", what="this") == (Message("user", "Only this"),)
    assert mixed.messages("rest") == (Message("user", "rest"),)
    reaching_out = "{% block user %}{{ ''.__class__.__mro__ }}{% endblock %}"
    for text in ("{% block user %}{{ missing }}{% endblock %}", "{% block", "no block", reaching_out):
        (other / "ask.jinja").write_text(text)
        with pytest.raises(ValueError, match=r"ask\.jinja"):
            PromptTemplates(own, other).messages("ask", how="", what="")
    with pytest.raises(FileNotFoundError, match=r"ask\.jinja, rest\.jinja"):
        PromptTemplates(own, tmp_path)
