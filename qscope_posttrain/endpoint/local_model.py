"""A chat model in this process, through transformers."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qscope_posttrain.endpoint.chat import ChatCompletion, ChatRequest, Message, RequestRefused
from qscope_posttrain.errors import UserValueError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LocalChatModel:
    """A causal language model and its chat template. Requests of equal sampling settings are generated together.

    Answers are drawn by a request's `Sampling` and nothing else: of the generation defaults of the model only the end
    tokens are used. Where the chat template has no place for a system message, it goes before the user's.
    """

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
        """Wrap a loaded model.

        Args:
            name: Name of the model in the cache; default the folder or hub id that it was loaded from.
            batch_size: Number of requests generated together.
            template_options: Further arguments of the chat template, for example {"enable_thinking": False}.
        """
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
        self._takes_system = self._has_place_for_system()

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": self._name, "local": True, "options": self._template_options}

    @property
    def route(self) -> Mapping[str, Any]:
        return {}

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatCompletion]:
        """See `ChatModel.complete`. A batch's seed is its own content, so that a run can be repeated.

        Raises:
            RequestRefused: a chat and its answer that exceed the context of the model.
            ValueError: the chat template refuses a chat.
        """
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
