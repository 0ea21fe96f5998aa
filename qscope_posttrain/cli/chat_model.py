"""Options of the commands that ask a chat model, and the session that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.options import check_one_process, json_object
from qscope_posttrain.cli.parsing.parser import given_options
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.report.progress import status

if TYPE_CHECKING:
    from qscope_posttrain.endpoint.chat import ChatModel
    from qscope_posttrain.endpoint.limits import Limits, RetryPolicy
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
"""Options, and their defaults, that mean nothing to a model in this process"""


def add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    """Which chat model to ask, how fast, and how much it may cost."""
    new = parser.add_argument_group("chat model").add_argument
    new("--chat-model", required=True, help="name of the model at the endpoint; with --local, folder or hub id")
    new("--judge-model", help="another model of the same endpoint for judging; by default --chat-model")
    new("--local", action="store_true", help="run the chat model in this process, with transformers")
    new("--base-url", help="URL of an OpenAI-compatible endpoint, up to /v1; by default OpenAI's own")
    new("--api-key-env", help="environment variable that holds the API key")
    new("--concurrency", type=int, default=8, help="requests at a time; with --local, the batch size")
    new("--requests-per-minute", type=float, help="maximum rate of requests, evenly spaced; no limit by default")
    new("--max-requests", type=int, help="budget: maximum number of requests, retries included")
    new("--max-total-tokens", type=int, help="budget: maximum number of tokens, prompts and answers together")
    new("--timeout", type=float, help="seconds before an attempt is given up")
    new("--attempts", type=int, help="maximum number of times that a request is sent")
    new("--send-seed", action="store_true", help="send seeds, for repeatable draws at endpoints that accept them")
    new("--max-tokens-name", help="name of the length limit in requests; some models need max_completion_tokens")
    new(
        "--request-options",
        help='JSON with further fields of a request, such as {"reasoning_effort": "low"}; with --local, further '
        'arguments of the chat template, such as {"enable_thinking": false}',
    )
    new("--ask-refused-again", action="store_true", help="repeat requests that the endpoint refused in earlier runs")
    new("--answers", help=f"file that keeps every answer; by default {ANSWERS} in the output folder")
    new("--templates", help="folder with templates that replace the package's own of the same name")
    parser.set_defaults(**ENDPOINT_ONLY)


def check_endpoint_options(options: argparse.Namespace) -> None:
    """Raise, before anything is loaded, for several processes, a mistaken option, one that --local does not use, no
    openai package, or no key where one is needed."""
    check_one_process("commands that ask a chat model run")
    _limits_and_retry(options)
    if not options.local:
        _endpoint_model(options, options.chat_model)
        return
    json_object(options.request_options, "--request-options")
    if useless := given_options(options, ENDPOINT_ONLY):
        raise UserValueError(f"{useless} of an endpoint cannot be used with --local; leave out either.")


@contextmanager
def open_session(options: argparse.Namespace, output: Path) -> Iterator[tuple[ChatSession, ChatSession]]:
    """(writer, judge): sessions with one cache and one budget; prints the usage at the end.

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
            usage = session.usage
            status(
                f"requests: {usage.sent} sent, {usage.failed} of them without an answer; {usage.cached} answers taken "
                f"from {cache.path}; {usage.tokens} tokens"
            )
            if usage.refused:
                status(
                    f"{usage.refused} requests were refused and have no answer; --ask-refused-again sends them once "
                    f"more. The first refusal: {usage.first_refusal}"
                )


def _limits_and_retry(options: argparse.Namespace) -> tuple[Limits, RetryPolicy]:
    from qscope_posttrain.endpoint.limits import Limits, RetryPolicy

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
