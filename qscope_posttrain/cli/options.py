"""Load what the shared options name: model, SAEs, settings of sampling, and the session with a chat model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.parsing.table import add_options, defaults_of
from qscope_posttrain.distributed import launched_processes
from qscope_posttrain.errors import UserValueError, naming_what_is_kept
from qscope_posttrain.models.loading import load_model, parse_layers
from qscope_posttrain.report.progress import status

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qscope_posttrain.endpoint.chat import ChatModel
    from qscope_posttrain.endpoint.session import ChatSession, Limits
    from qscope_posttrain.models.generation import SamplingSettings
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

ANSWERS = "answers.jsonl"
CHAT_MODEL = f"""
--chat-model: text required  # name of the model at the endpoint; with --local, folder or hub id
--judge-model: text  # another model of the same endpoint for judging; by default --chat-model
--local: switch  # run the chat model in this process, with transformers
--concurrency: int = 8  # requests at a time; with --local, the batch size
--requests-per-minute: float  # maximum rate of requests, evenly spaced; no limit by default
--max-requests: int  # budget: maximum number of requests, retries included
--max-total-tokens: int  # budget: maximum number of tokens, prompts and answers together
--request-options: text  # JSON with further fields of a request, such as {{"reasoning_effort": "low"}}; with --local,
    further arguments of the chat template, such as {{"enable_thinking": false}}
--ask-refused-again: switch  # repeat requests that the endpoint refused in earlier runs
--answers: text  # file that keeps every answer; by default {ANSWERS} in the output folder
--templates: text  # folder with templates that replace the package's own of the same name
"""
ENDPOINT = """
--base-url: text  # URL of an OpenAI-compatible endpoint, up to /v1; by default OpenAI's own
--api-key-env: text = OPENAI_API_KEY  # environment variable that holds the API key
--timeout: float = 120  # seconds before an attempt is given up
--attempts: int = 6  # maximum number of times that a request is sent
--send-seed: switch  # send seeds, for repeatable draws at endpoints that accept them
--max-tokens-name: text = max_tokens  # name of the length limit in requests; some models need max_completion_tokens
"""
"""Options that mean nothing to a model in this process"""


def sampling_settings(options: argparse.Namespace, **changes: Any) -> SamplingSettings:
    """The settings that the options of SAMPLING give."""
    from qscope_posttrain.models.generation import SamplingSettings

    names = ("temperature", "top_p", "max_new_tokens", "seed", "batch_size")
    given = {"samples_per_prompt": options.samples, **chosen(options, *names)}
    return SamplingSettings(**{**given, **changes})


def chosen(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The values of these options, by name."""
    return {name: getattr(options, name) for name in names}


def chat_settings(options: argparse.Namespace) -> dict[str, Any]:
    """--chat and --chat-template-options as arguments of the functions that sample."""
    template = json_object(options.chat_template_options, "--chat-template-options")
    return {"chat": options.chat, "chat_template_options": template}


def json_object(text: str | None, option: str) -> dict[str, Any]:
    """The JSON object that an option gives; empty from None. ValueError, naming the option, for anything else."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserValueError(f"{option} must be JSON, got '{text}' ({error.msg}).") from error
    if not isinstance(found, dict):
        raise UserValueError(f"{option} must be a JSON object, got '{text}'.")
    return found


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of the model options."""
    return load_model(options.model, options.revision, options.dtype, options.device)


def layers_of(words: Sequence[str], model: nn.Module) -> tuple[int, ...]:
    """The layers of a model that the words of --layers name."""
    from qscope_posttrain.models.layers import decoder_layers

    return parse_layers(words, len(decoder_layers(model)))


def load_saes(options: argparse.Namespace, layers: Sequence[int], model: nn.Module) -> dict[int, SparseAutoencoder]:
    """The SAEs of --sae, one per layer, on the device of the model and checked against its width."""
    from qscope_posttrain.sae.autoencoder import load_sae

    return {layer: load_sae(options.sae, layer, options.k, model) for layer in layers}


def check_one_process(what: str) -> None:
    """ValueError under a launcher, for what runs in one process."""
    if launched_processes() > 1:
        raise UserValueError(f"{what} in one process; start it without a launcher.")


def check_only_with(options: argparse.Namespace, table: str, why: str) -> None:
    """ValueError where an option of `table` is given that has no effect, in words `why`."""
    given = [name for name, default in defaults_of(table).items() if getattr(options, name) != default]
    if given:
        raise UserValueError(f"{', '.join('--' + name.replace('_', '-') for name in given)}{why}")


def add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    """Which chat model to ask, how fast, and how much it may cost."""
    add_options(parser.add_argument_group("chat model"), CHAT_MODEL, ENDPOINT)


def check_endpoint_options(options: argparse.Namespace) -> None:
    """Raise, before anything is loaded, for several processes, a mistaken option, one that --local does not use, no
    openai package, or no key where one is needed."""
    check_one_process("commands that ask a chat model run")
    _limits(options)
    if options.local:
        json_object(options.request_options, "--request-options")
        check_only_with(options, ENDPOINT, " of an endpoint cannot be used with --local; leave out either.")
    else:
        _chat_model(options, options.chat_model)


@contextmanager
def open_session(options: argparse.Namespace, output: Path) -> Iterator[tuple[ChatSession, ChatSession]]:
    """(writer, judge): sessions with one cache and one budget; prints the usage at the end. ValueError as
    `check_endpoint_options`, or for a cache in use by another process."""
    from qscope_posttrain.endpoint.cache import CompletionCache
    from qscope_posttrain.endpoint.session import ChatSession

    check_endpoint_options(options)
    limits = _limits(options)
    model = _chat_model(options, options.chat_model)
    with CompletionCache(options.answers or output / ANSWERS, ask_refused_again=options.ask_refused_again) as cache:
        if len(cache):
            status(f"{len(cache)} answers in {cache.path} need not be asked for again")
        session = ChatSession(model, cache, limits=limits)
        judge = session
        if options.judge_model not in (None, options.chat_model):
            judge = session.beside(_chat_model(options, options.judge_model))
        try:
            kept = f"answers are kept in '{cache.path}': the same command goes on from them."
            with naming_what_is_kept(lambda: f"{len(cache)} {kept}"):
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


def _limits(options: argparse.Namespace) -> Limits:
    from qscope_posttrain.endpoint.session import Limits

    return Limits(options.requests_per_minute, options.max_requests, options.max_total_tokens, options.attempts)


def _chat_model(options: argparse.Namespace, name: str) -> ChatModel:
    more = json_object(options.request_options, "--request-options")
    if options.local:
        from qscope_posttrain.endpoint.models import LocalChatModel

        model, tokenizer = load_model(name, None, options.dtype, options.device)
        return LocalChatModel(model, tokenizer, name=name, batch_size=options.concurrency, template_options=more)
    from qscope_posttrain.endpoint.models import OFFICIAL, OpenAIChatModel

    names = ("api_key_env", "timeout", "concurrency", "send_seed", "max_tokens_name")
    return OpenAIChatModel(name, options.base_url or OFFICIAL, options=more, **chosen(options, *names))
