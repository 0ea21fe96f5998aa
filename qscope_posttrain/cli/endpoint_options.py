"""Options of the commands that ask a chat model, and the session that they describe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qscope_posttrain.cli.inputs import json_object, load_model
from qscope_posttrain.report.progress import status

if TYPE_CHECKING:
    from qscope_posttrain.endpoint.chat import ChatModel
    from qscope_posttrain.endpoint.session import ChatSession

ANSWERS = "answers.jsonl"


def add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    """Which chat model is asked, how fast, and how much it may cost."""
    group = parser.add_argument_group("chat model")
    group.add_argument("--chat-model", required=True, help="name at the endpoint; with --local, folder or hub id")
    group.add_argument("--judge-model", help="another model of the same endpoint for judging; by default the same one")
    group.add_argument("--local", action="store_true", help="run the chat model here, with transformers")
    group.add_argument("--base-url", help="of an OpenAI-compatible endpoint, up to /v1; by default OpenAI's own")
    group.add_argument("--api-key-env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    group.add_argument("--concurrency", type=int, default=8, help="requests at a time; with --local, in a batch")
    group.add_argument("--requests-per-minute", type=float, help="sent at even distances; no limit by default")
    group.add_argument("--max-requests", type=int, help="budget of requests, further attempts included")
    group.add_argument("--max-total-tokens", type=int, help="budget of tokens, prompts and answers together")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds for one attempt")
    group.add_argument("--attempts", type=int, default=6, help="times that a request is sent at most")
    group.add_argument("--send-seed", action="store_true", help="send seeds: repeatable draws, where they are taken")
    group.add_argument(
        "--max-tokens-name", default="max_tokens", help="or max_completion_tokens, where a model asks so"
    )
    group.add_argument("--request-options", help='JSON with further fields, for example {"reasoning_effort": "low"}')
    group.add_argument("--answers", help=f"file that keeps every answer; by default {ANSWERS} in the output folder")
    group.add_argument("--templates", help="folder with templates that replace the package's own, by name")


@contextmanager
def open_session(options: argparse.Namespace, output: Path) -> Iterator[tuple[ChatSession, ChatSession]]:
    """(writer, judge): sessions with one cache and one budget. Says at the end what was used.

    Raises:
        ValueError: several processes, a mistaken option, or a cache in use by another process.
    """
    from qscope_posttrain.endpoint.cache import CompletionCache
    from qscope_posttrain.endpoint.failures import RetryPolicy
    from qscope_posttrain.endpoint.limits import Limits
    from qscope_posttrain.endpoint.session import ChatSession

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("commands that ask a chat model run in one process; start it without a launcher.")
    limits = Limits(options.requests_per_minute, options.max_requests, options.max_total_tokens)
    retry = RetryPolicy(attempts=options.attempts)
    model = _chat_model(options, options.chat_model)
    with CompletionCache(options.answers or output / ANSWERS) as cache:
        if len(cache):
            status(f"{len(cache)} answers in {cache.path} need not be asked for again")
        session = ChatSession(model, cache, limits=limits, retry=retry)
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


def _chat_model(options: argparse.Namespace, name: str) -> ChatModel:
    if options.local:
        from qscope_posttrain.endpoint.local_model import LocalChatModel

        if options.base_url is not None:
            raise ValueError("give --base-url for an endpoint, or --local for a model here, not both.")
        model, tokenizer = load_model(name, None, options.dtype, options.device)
        return LocalChatModel(model, tokenizer, name=name, batch_size=options.concurrency)
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
