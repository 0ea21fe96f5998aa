"""Chat models: one behind any OpenAI-compatible endpoint, through the `openai` package, and one in this process."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qscope_posttrain.endpoint.chat import ChatCompletion, ChatRequest, Message, RequestFailed, RequestRefused
from qscope_posttrain.errors import UserValueError, library_refusals, require_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OFFICIAL = "https://api.openai.com/v1"
RETRIED_STATUS = frozenset({408, 409, 425, 429})  # Client errors that pass; so does every status from 500 on
REFUSED_STATUS = frozenset({400, 413, 422})
"""Client errors of one request; others, such as a wrong key, are errors of all."""
ACCOUNT_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "invalid_api_key"})
"""Codes that neither waiting nor another request cures, whatever the status."""
CONTENT_CODES = frozenset({
    "content_filter", "content_policy_violation", "invalid_prompt", "data_inspection_failed",
    "context_length_exceeded", "string_above_max_length",
})  # fmt: skip
"""Codes that name the content of a request, or its length, as the reason."""


class OpenAIChatModel:
    """One model of one endpoint. The key comes from the environment, and goes nowhere but to the endpoint."""

    batch_size = 1

    def __init__(
        self,
        model: str,
        base_url: str = OFFICIAL,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        concurrency: int = 8,
        send_seed: bool = False,
        max_tokens_name: str = "max_tokens",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            base_url: Address up to and including `/v1`.
            api_key_env: Environment variable that holds the key; most servers of one's own need none.
            timeout: Seconds for one attempt.
            send_seed: Send the sample number as `seed`, which makes draws repeatable on servers that support it; others
                refuse the request.
            max_tokens_name: "max_tokens", or "max_completion_tokens" where a model refuses the former.
            options: Further JSON fields of every request, for example {"reasoning_effort": "low"}.
        """
        require_extra("endpoint")
        import openai

        with library_refusals("base_url"):
            place = urlsplit(base_url)
        if place.scheme not in ("http", "https") or not place.netloc:
            raise UserValueError(f"base_url must begin with http:// or https://; got '{base_url.partition('?')[0]}'.")
        if "@" in place.netloc or place.query:
            raise UserValueError(f"base_url must hold no key or password; put the key into {api_key_env}.")
        if max_tokens_name not in ("max_tokens", "max_completion_tokens"):
            raise UserValueError(f"max_tokens_name is max_tokens or max_completion_tokens; got {max_tokens_name!r}.")
        if concurrency < 1 or timeout <= 0:
            raise UserValueError(f"concurrency and timeout must be positive; got {concurrency} and {timeout}.")
        self._key = os.environ.get(api_key_env, "")
        if not self._key and base_url.rstrip("/") == OFFICIAL:
            raise UserValueError(f"{OFFICIAL} needs a key in the environment variable {api_key_env}.")
        self.model, self.concurrency = model, concurrency
        self._send_seed, self._max_tokens_name, self._options = send_seed, max_tokens_name, dict(options or {})
        # Not the address: a model served elsewhere is the same, and its answers stay paid for.
        self.identity: Mapping[str, Any] = {"name": model, "seeded": send_seed, "options": self._options}
        # Another server may answer a request that one refuses or cannot read.
        self.route: Mapping[str, Any] = {"address": base_url.rstrip("/"), "max_tokens_name": max_tokens_name}
        self._openai = openai
        # max_retries=0: a session counts every request that is sent, and waits by itself
        self._client = openai.OpenAI(base_url=base_url, api_key=self._key or "none", timeout=timeout, max_retries=0)

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatCompletion]:
        """See `ChatModel.complete`."""
        openai, (request,) = self._openai, requests
        settings: dict[str, Any] = {self._max_tokens_name: request.sampling.max_tokens}
        messages: Any = [{"role": message.role, "content": message.content} for message in request.messages]
        if self._send_seed:
            settings["seed"] = request.sample
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=messages,
                temperature=request.sampling.temperature,
                top_p=request.sampling.top_p,
                extra_body=self._options or None,
                **settings,
            )
            return [read_completion(response.text)]
        except openai.APIStatusError as error:
            raise self._status_failure(error) from error
        except openai.APITimeoutError as error:
            raise RequestFailed(f"{self.model}: no answer in time", retry=True) from error
        except openai.APIError as error:  # no connection, or one that broke
            raise RequestFailed(self._shown(f"{error} ({error.__cause__})"), retry=True) from error

    def _status_failure(self, error: Any) -> RequestFailed:
        status, code = error.status_code, str(getattr(error, "code", None))
        reason = f"status {status}: {error.message}"
        key_refused = "api key" in reason.lower().replace("_", " ")  # some servers answer 400 to a wrong one
        if status in REFUSED_STATUS and code not in ACCOUNT_CODES and not key_refused:
            return RequestRefused(self._shown(reason), content=status == 413 or code in CONTENT_CODES)
        retry = (status in RETRIED_STATUS or status >= 500) and code not in ACCOUNT_CODES
        after = retry_after_seconds(error.response.headers.get("retry-after")) if retry else None
        return RequestFailed(self._shown(reason), retry=retry, retry_after=after)

    def _shown(self, reason: str) -> str:
        """Name the model, and hide the key, which a server may quote when it refuses it."""
        shown = reason.replace(self._key, "***") if self._key else reason
        return f"{self.model}: {shown[:500]}"


def retry_after_seconds(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for, as a number or an HTTP date; None where it is neither."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            when = parsedate_to_datetime(value or "")
        except ValueError:
            return None
        seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if seconds == seconds else None


def read_completion(body: str) -> ChatCompletion:
    """Read the answer in the body of a response. RequestFailed if it holds none; another attempt may bring one."""
    try:
        content = json.loads(body)
        choice = content["choices"][0]
        text, usage = choice["message"]["content"], content.get("usage") or {}
        completion = ChatCompletion(
            text=text if text is not None else "",
            finish_reason=str(choice.get("finish_reason")),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            request_id=str(content.get("id") or ""),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise RequestFailed(f"the endpoint's response is no chat completion: {body[:200]!r}", retry=True) from error
    if not isinstance(completion.text, str):
        raise RequestFailed(f"the endpoint's answer is no text: {body[:200]!r}", retry=True)
    return completion


class LocalChatModel:
    """A causal language model and its chat template. Requests of equal sampling settings are generated together.
    Answers are drawn by a request's `Sampling` and nothing else: of the generation defaults of the model only the end
    tokens are used. Where the chat template has no place for a system message, it goes before the user's."""

    concurrency = 1

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        batch_size: int = 8,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap a loaded model. `name` is that in the cache, by default the folder or hub id that it was loaded from;
        `template_options` are further arguments of the chat template, for example {"enable_thinking": False}."""
        if tokenizer.chat_template is None:
            raise UserValueError(f"{type(tokenizer).__name__} has no chat template, which a chat model needs.")
        self._name = name or str(getattr(model.config, "_name_or_path", ""))
        if not self._name:
            raise UserValueError("the cache knows a model by its name; give name=.")
        if batch_size < 1:
            raise UserValueError(f"batch_size must be at least 1; got {batch_size}.")
        self.batch_size = batch_size
        self._model, self._tokenizer = model, tokenizer
        self._template_options = dict(template_options or {})
        self.identity: Mapping[str, Any] = {"name": self._name, "local": True, "options": self._template_options}
        self.route: Mapping[str, Any] = {}
        self._takes_system = self._has_place_for_system()

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatCompletion]:
        """See `ChatModel.complete`. A batch's seed is its own content, so that a run can be repeated. RequestRefused
        if a chat and its answer exceed the context of the model, ValueError if the chat template refuses a chat."""
        from qscope_posttrain.models.generation import SamplingSettings, sample_batch

        found: dict[int, ChatCompletion] = {}
        for sampling in dict.fromkeys(request.sampling for request in requests):
            chosen = [index for index, request in enumerate(requests) if request.sampling == sampling]
            ids = [self._encoded(requests[index]) for index in chosen]
            settings = SamplingSettings(
                samples_per_prompt=1,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_new_tokens=sampling.max_tokens,
                seed=int(requests[chosen[0]].key(self.identity)[:15], 16),
            )
            written = sample_batch(self._model, self._tokenizer, ids, settings)
            for index, prompt, (answer, ended) in zip(chosen, ids, written, strict=True):
                found[index] = ChatCompletion(
                    text=str(self._tokenizer.decode(answer, skip_special_tokens=True)),
                    finish_reason="stop" if ended else "length",
                    prompt_tokens=len(prompt),
                    completion_tokens=len(answer),
                    request_id=f"local-{uuid.uuid4().hex[:12]}",
                )
        return [found[index] for index in range(len(requests))]

    def _encoded(self, request: ChatRequest) -> list[int]:
        from qscope_posttrain.models.layers import text_config

        messages = request.messages if self._takes_system else with_user(request.messages)
        # The template wrote the special tokens already.
        ids: list[int] = self._tokenizer(self._written(messages), add_special_tokens=False)["input_ids"]
        room = getattr(text_config(self._model), "max_position_embeddings", None)
        if room is not None and len(ids) + request.sampling.max_tokens > room:
            raise RequestRefused(
                f"{self._name}: {len(ids)} tokens of a chat and {request.sampling.max_tokens} of its answer are more "
                f"than the {room} positions of the model",
                content=True,
            )
        return ids

    def _written(self, messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self._template_options
            )
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise UserValueError(f"the chat template of {self._name} refuses a chat of {roles}: {error}") from error
        return str(text)

    def _has_place_for_system(self) -> bool:
        """Templates without one raise an error, or leave the message out silently."""
        word = "system-5d81"
        try:
            return word in self._written((Message("system", word), Message("user", "a")))
        except ValueError:
            return False


def with_user(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Move the text of system messages before the first message of the user."""
    system = [message.content for message in messages if message.role == "system"]
    rest = [message for message in messages if message.role != "system"]
    if not system:
        return tuple(rest)
    place = next((place for place, message in enumerate(rest) if message.role == "user"), None)
    if place is None:
        return (Message("user", "\n\n".join(system)), *rest)
    rest[place] = Message("user", "\n\n".join([*system, rest[place].content]))
    return tuple(rest)
