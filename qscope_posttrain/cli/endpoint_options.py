"""Options of the commands that ask a chat model, and the session that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.inputs import json_object, load_model
from qscope_posttrain.cli.options import given_options
from qscope_posttrain.distributed import launched_processes
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import status

if TYPE_CHECKING:
    from qscope_posttrain.endpoint.chat import ChatModel
    from qscope_posttrain.endpoint.failures import RetryPolicy
    from qscope_posttrain.endpoint.limits import Limits, Usage
    from qscope_posttrain.endpoint.session import ChatSession

ANSWERS = "answers.jsonl"
ENDPOINT_ONLY: dict[str, Any] = {
    "base_url": None,
    "api_key_env": "OPENAI_API_KEY",
    "timeout": 120.0,
    "attempts": 6,
    "send_seed": False,
    "max_tokens_name": "max_tokens",
}
"""Options, and their defaults, that mean nothing to a model in this process."""


def add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    """Which chat model is asked, how fast, and how much it may cost."""
    group = parser.add_argument_group("chat model")
    group.add_argument("--chat-model", required=True, help="name at the endpoint; with --local, folder or hub id")
    group.add_argument("--judge-model", help="another model of the same endpoint for judging; by default the same one")
    group.add_argument("--local", action="store_true", help="run the chat model here, with transformers")
    group.add_argument("--base-url", help="of an OpenAI-compatible endpoint, up to /v1; by default OpenAI's own")
    group.add_argument("--api-key-env", help="environment variable that holds the key")
    group.add_argument("--concurrency", type=int, default=8, help="requests at a time; with --local, in a batch")
    group.add_argument("--requests-per-minute", type=float, help="sent at even distances; no limit by default")
    group.add_argument("--max-requests", type=int, help="budget of requests, further attempts included")
    group.add_argument("--max-total-tokens", type=int, help="budget of tokens, prompts and answers together")
    group.add_argument("--timeout", type=float, help="seconds for one attempt")
    group.add_argument("--attempts", type=int, help="times that a request is sent at most")
    group.add_argument("--send-seed", action="store_true", help="send seeds: repeatable draws, where they are taken")
    group.add_argument("--max-tokens-name", help="or max_completion_tokens, where a model asks so")
    group.add_argument(
        "--request-options",
        help='JSON with further fields of a request, for example {"reasoning_effort": "low"}; with --local, further '
        'arguments of the chat template, for example {"enable_thinking": false}',
    )
    group.add_argument(
        "--ask-refused-again", action="store_true", help="ask again what the endpoint refused for good in earlier runs"
    )
    group.add_argument("--answers", help=f"file that keeps every answer; by default {ANSWERS} in the output folder")
    group.add_argument("--templates", help="folder with templates that replace the package's own, by name")
    parser.set_defaults(**ENDPOINT_ONLY)


def check_endpoint_options(options: argparse.Namespace) -> None:
    """Find the mistakes in these options before anything is loaded.

    Raises:
        ValueError: several processes, an option that --local has no use for, a mistaken one, no openai package, or no
            key where one is needed.
    """
    if launched_processes() > 1:
        raise UserValueError("commands that ask a chat model run in one process; start it without a launcher.")
    _limits_and_retry(options)
    if not options.local:
        _endpoint_model(options, options.chat_model)
        return
    json_object(options.request_options, "--request-options")
    if useless := given_options(options, ENDPOINT_ONLY):
        raise UserValueError(f"{useless} of an endpoint cannot be used with --local; leave out either.")


@contextmanager
def open_session(options: argparse.Namespace, output: Path) -> Iterator[tuple[ChatSession, ChatSession]]:
    """(writer, judge): sessions with one cache and one budget. Says at the end what was used.

    Raises:
        ValueError: as `check_endpoint_options`, or a cache in use by another process.
    """
    from qscope_posttrain.endpoint.cache import CompletionCache
    from qscope_posttrain.endpoint.session import ChatSession

    check_endpoint_options(options)
    limits, retry = _limits_and_retry(options)
    model = _chat_model(options, options.chat_model)
    with CompletionCache(options.answers or output / ANSWERS) as cache:
        if len(cache):
            status(f"{len(cache)} answers in {cache.path} need not be asked for again")
        session = ChatSession(model, cache, limits=limits, retry=retry, ask_refused_again=options.ask_refused_again)
        judge = session
        if options.judge_model not in (None, options.chat_model):
            judge = session.beside(_chat_model(options, options.judge_model))
        try:
            yield session, judge
        finally:
            _say_usage(session.usage, cache.path)


def _say_usage(usage: Usage, answers: Path) -> None:
    status(
        f"requests: {usage.sent} sent, {usage.failed} of them without an answer; {usage.cached} answers taken "
        f"from {answers}; {usage.tokens} tokens"
    )
    if usage.refused:
        status(
            f"{usage.refused} requests were refused and have no answer; --ask-refused-again sends them once more. "
            f"The first refusal: {usage.first_refusal}"
        )


def _limits_and_retry(options: argparse.Namespace) -> tuple[Limits, RetryPolicy]:
    from qscope_posttrain.endpoint.failures import RetryPolicy
    from qscope_posttrain.endpoint.limits import Limits

    limits = Limits(options.requests_per_minute, options.max_requests, options.max_total_tokens)
    return limits, RetryPolicy(attempts=options.attempts)


def _chat_model(options: argparse.Namespace, name: str) -> ChatModel:
    if not options.local:
        return _endpoint_model(options, name)
    from qscope_posttrain.endpoint.local_model import LocalChatModel

    model, tokenizer = load_model(name, None, options.dtype, options.device)
    return LocalChatModel(
        model,
        tokenizer,
        name=name,
        batch_size=options.concurrency,
        template_options=json_object(options.request_options, "--request-options"),
    )


def _endpoint_model(options: argparse.Namespace, name: str) -> ChatModel:
    from qscope_posttrain.endpoint.openai_model import OFFICIAL, OpenAIChatModel

    return OpenAIChatModel(
        name,
        options.base_url or OFFICIAL,
        api_key_env=options.api_key_env,
        timeout=options.timeout,
        concurrency=options.concurrency,
        send_seed=options.send_seed,
        max_tokens_name=options.max_tokens_name,
        options=json_object(options.request_options, "--request-options"),
    )
