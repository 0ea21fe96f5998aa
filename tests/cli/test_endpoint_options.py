"""Options of the chat model: mistakes found before a model is loaded, and a model in this process as the chat model."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
from endpoint_server import serving

from qscope_posttrain.cli import options as cli_options
from qscope_posttrain.cli.main import main
from qscope_posttrain.cli.options import add_endpoint_options, check_endpoint_options, open_session
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.endpoint.chat import ChatRequest, Message, Sampling

COMMANDS = {
    "evaluate safety": ["evaluate", "safety", "--prompts", "none.jsonl"],
    "features explain": ["features", "explain", "--texts", "none.txt", "--sae", "none"],
    "synthesize": [
        "synthesize", "--sae", "none", "--explanations", "none.jsonl", "--topic", "ladders", "--seed-data", "none.txt",
    ],
}  # fmt: skip


def parsed(*more: str) -> argparse.Namespace:
    parser = CommandParser()
    add_endpoint_options(parser)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    return parser.parse(["--chat-model", "m", *more])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_openai_package_is_said_before_anything_is_read(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    arguments = [*COMMANDS[command], "--model", "none", "--output", str(tmp_path / "out"), "--chat-model", "m"]
    assert main([*arguments, "--base-url", "http://127.0.0.1:9/v1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "pip install 'qscope_posttrain[endpoint]'" in error


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--send-seed"], "--send-seed"),
        (["--max-tokens-name", "max_completion_tokens"], "--max-tokens-name"),
        (["--timeout", "5", "--attempts", "2"], "--timeout, --attempts"),
        (["--base-url", "http://127.0.0.1:9/v1"], "--base-url"),
        (["--api-key-env", "MY_KEY"], "--api-key-env"),
        (["--request-options", "{"], "--request-options"),
    ],
)
def test_options_of_an_endpoint_are_refused_for_a_local_model(more, named):
    with pytest.raises(ValueError, match=named):
        check_endpoint_options(parsed("--local", *more))


def test_a_local_model_takes_what_applies_to_it():
    options = parsed("--local", "--max-requests", "3", "--concurrency", "2", "--request-options", '{"thinking": false}')
    check_endpoint_options(options)
    assert (options.timeout, options.attempts, options.max_tokens_name) == (120.0, 6, "max_tokens")


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--attempts", "0"], "attempts"), (["--max-requests", "0"], "max_requests"), ([], "OPENAI_API_KEY")],
)
def test_mistakes_are_found_at_once(more, message, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=message):
        check_endpoint_options(parsed(*more))


def test_request_options_are_the_template_s_of_a_local_model(world, tmp_path, monkeypatch):
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{{ 'think ' * 9 if thinking else '' }}"
    load = cli_options.load_model

    def with_template(*arguments):
        model, tokenizer = load(*arguments)
        tokenizer.chat_template = template
        return model, tokenizer

    monkeypatch.setattr(cli_options, "load_model", with_template)
    request = ChatRequest((Message("user", "The river"),), Sampling(temperature=0, max_tokens=2))
    counts = []
    for given in ('{"thinking": false}', '{"thinking": true}'):
        options = parsed("--local", "--chat-model", world.model, "--request-options", given)
        with open_session(options, tmp_path) as (session, _):
            counts.append(session.complete([request])[0].prompt_tokens)
            assert session.usage.sent == 1  # not the other one's answer from the file
    assert counts[0] < counts[1]


def test_refusals_are_said_and_asked_again_on_request(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(cli_options, "status", said.append)
    requests = [ChatRequest((Message("user", text),)) for text in ("a", "b")]
    with serving(lambda body: "yes", [("ok", None), ("status", (400, {}))]) as server:
        common = ["--base-url", server.url, "--concurrency", "1"]
        with open_session(parsed(*common), tmp_path) as (session, _):
            session.complete(requests)
        assert said[-1].startswith("1 requests were refused")
        assert "told to fail" in said[-1]
        with open_session(parsed(*common, "--ask-refused-again"), tmp_path) as (session, _):
            assert [completion.text for completion in session.complete(requests)] == ["yes", "yes"]
        assert len(server.requests) == 3
    assert json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[1])["completion"]["refusal"]
