"""Sample responses from a model: batched, reproducible, and without a trace in the caller's state."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from qscope_posttrain.errors import UserTypeError, UserValueError, finite_probabilities
from qscope_posttrain.models.layers import evaluation_mode, pretrained_model, text_config, unwrapped
from qscope_posttrain.record_file import draw_and_keep
from qscope_posttrain.report.progress import progress

Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""Text to continue, the messages of a chat (`{"role": ..., "content": ...}`), or a row of TRL's data sets: one of these
as `prompt`, with `tools` and `chat_template_kwargs` of its own for the chat template. Messages that end with the
assistant's are continued there."""
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # Columns of TRL's data sets that are passed to the chat template


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn. The defaults are those of the SASFT evaluation, except that it allows 2048 tokens."""

    samples_per_prompt: int = 8  # Number of responses to each prompt
    temperature: float = 1.0
    """Divides the logits; 0 decodes greedily. Switching depends strongly on it: always report it."""
    top_p: float = 0.8
    """Nucleus: the likeliest tokens with together at least this probability are kept; 1 keeps all. No top-k, no
    penalties."""
    max_new_tokens: int = 256
    """Longest response, in tokens. The longer it is, the more room to switch: always report it."""
    seed: int = 0
    """Of the sampling. The same settings give the same responses on the same machine; `batch_size` is one of them."""
    batch_size: int = 32  # Number of responses generated at a time

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.temperature < 0:
            raise UserValueError(f"temperature must be at least 0; got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise UserValueError(f"top_p must lie in (0, 1]; got {self.top_p}.")
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise UserValueError(
                f"temperature=0 gives the same response every time, but samples_per_prompt={self.samples_per_prompt}; "
                "set samples_per_prompt=1 or a positive temperature."
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """One response of the model."""

    language: str  # Source language: the language of the prompt, in which the response should be
    prompt_index: int  # Number of the prompt within its language, from 0
    sample_index: int  # Number of the response to that prompt, from 0
    prompt: str  # The text that the model read, chat template included
    response: str  # The text that it wrote, without special tokens
    ended: bool  # Whether it ended by itself, rather than at `max_new_tokens`
    prompt_tokens: tuple[int, ...] = ()  # Token ids of the prompt; empty where they were not kept
    tokens: tuple[int, ...] = ()
    """Token ids of the response up to, not including, the end token; empty where they were not kept."""

    def __post_init__(self) -> None:
        # JSON knows no tuples: a sample that was written and read again equals the one that was written.
        for name in ("prompt_tokens", "tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_dict(self, tokens: bool = True) -> dict[str, Any]:
        """The fields, JSON-ready; with `tokens=False` those that a person reads, without the token ids."""
        values = asdict(self)
        return values if tokens else {name: values[name] for name in values if not name.endswith("tokens")}


class Response(NamedTuple):
    """The new tokens up to, not including, the end token, and whether there was one."""

    tokens: list[int]
    ended: bool


class SamplingEngine(Protocol):
    """Generates in place of a model of transformers; `models.vllm_sampler.VLLMSampler` is one."""

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the text decoder."""
        ...

    def stated(self) -> dict[str, Any]:
        """Settings to report with the results."""
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        tokenizer: PreTrainedTokenizerBase,
        show_progress: bool | None = None,
    ) -> list[Response]:
        """One response to each encoded prompt; `settings.batch_size` is not read."""
        ...


def generate_samples(
    model: nn.Module | SamplingEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[Prompt]],
    settings: SamplingSettings | None = None,
    *,
    chat: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    show_progress: bool | None = None,
    keep: str | os.PathLike[str] | None = None,
) -> list[Sample]:
    """Draw `settings.samples_per_prompt` responses to every prompt with the model's `generate`, or another engine.

    Only `settings` shape the distribution: defaults that come with a model (top-k, repetition penalty) are set aside,
    its end tokens are kept. Mode and defaults of the model, tokenizer and random state are afterwards as before.

    Args:
        model: a causal language model of transformers, plain or wrapped, or an engine such as `VLLMSampler`.
        prompts: prompts per source language. Messages always go through the chat template; so do strings if `chat`.
        chat: whether a string is the message of a user to a chat model, rather than text to continue.
        chat_template_options: further arguments of the template, e.g. `{"enable_thinking": False}`.
        keep: file for each batch as it is drawn, from which the same call goes on; not of another engine.

    Returns:
        Samples ordered by language (as in `prompts`), prompt, sample.

    Raises:
        ValueError: no prompts, or an empty or damaged one; one too long for the model; a chat without a chat template,
            or that it refuses.
        TypeError: a string where a list of prompts is expected.
    """
    settings = settings or SamplingSettings()
    encoded = _encoded(tokenizer, prompts, chat, dict(chat_template_options or {}))
    config = text_config(model) if isinstance(model, nn.Module) else model.config
    _check_lengths(config, settings, {_named(prompt.language, prompt.number): prompt.ids for prompt in encoded})
    # Long prompts first: rows of one batch need little padding, and memory runs out at once or never.
    by_length = sorted(range(len(encoded)), key=lambda place: -len(encoded[place].ids))
    rows = [(place, number) for place in by_length for number in range(settings.samples_per_prompt)]
    responses: dict[tuple[int, int], Response] = {}
    if isinstance(model, nn.Module):
        batches = [rows[start : start + settings.batch_size] for start in range(0, len(rows), settings.batch_size)]
        read = [[encoded[place].ids for place, _ in batch] for batch in batches]
        shaped = [settings.to_dict(), read, str(config)]
        with _sampling(model, tokenizer, settings) as generate:
            drawn = map(generate, read) if keep is None else draw_and_keep(keep, model, shaped, read, generate)
            shown = progress(drawn, len(batches), description="sampling responses", enabled=show_progress)
            for batch, found in zip(batches, shown, strict=True):
                responses.update(zip(batch, map(Response._make, found), strict=True))
    else:
        asked = [encoded[place].ids for place, _ in rows]
        responses.update(zip(rows, model.sample(asked, settings, tokenizer, show_progress), strict=True))
    samples = []
    for (place, number), (tokens, ended) in sorted(responses.items()):
        language, index, text, ids = encoded[place]
        response = str(tokenizer.decode(tokens, skip_special_tokens=True))
        samples.append(Sample(language, index, number, text, response, ended, tuple(ids), tuple(tokens)))
    return samples


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    chat: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Encode prompts as `generate_samples` does, where arguments and errors are documented."""
    return [prompt.ids for prompt in _encoded(tokenizer, {"": prompts}, chat, dict(chat_template_options or {}))]


def sample_batch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt_ids: Sequence[Sequence[int]],
    settings: SamplingSettings,
) -> list[Response]:
    """Draw one response to each encoded prompt, all in one batch with the rows in the order given, for a caller who
    does something to certain rows meanwhile (see `steering.steer`). Ignores `samples_per_prompt` and `batch_size`."""
    _check_lengths(text_config(model), settings, {_named("", number): ids for number, ids in enumerate(prompt_ids)})
    with _sampling(model, tokenizer, settings) as generate:
        return generate(prompt_ids)


class _Encoded(NamedTuple):
    language: str
    number: int
    text: str  # What the model reads
    ids: list[int]


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[Prompt]],
    chat: bool,
    template_options: dict[str, Any],
) -> list[_Encoded]:
    if not prompts:
        raise UserValueError("No prompts given; expected a list of prompts for at least one source language.")
    encoded = []
    for language, group in prompts.items():
        if isinstance(group, str):
            raise UserTypeError(f"Prompts of {language!r} must be a list of prompts; got one string.")
        if len(group) == 0:
            raise UserValueError(f"No prompts for the source language {language!r}; give some or leave it out.")
        for index, given in enumerate(group):
            name = _named(language, index)
            text, templated = _prompt_text(tokenizer, name, given, chat, template_options)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserValueError(
                    f"{name} is damaged: character {error.start} is half of a surrogate pair "
                    f"({text[error.start]!r}), as a cut emoji leaves it. Mend or remove the prompt."
                ) from error
            # A chat template writes the special tokens itself.
            ids = list(tokenizer(text, add_special_tokens=not templated)["input_ids"])
            encoded.append(_Encoded(language, index, text, ids))
    return encoded


def _prompt_text(
    tokenizer: PreTrainedTokenizerBase, name: str, given: Prompt, chat: bool, template_options: dict[str, Any]
) -> tuple[str, bool]:
    """The text that the model will read, and whether a template wrote it."""
    row: Mapping[str, Any] = given if isinstance(given, Mapping) else {"prompt": given}
    prompt, own = row.get("prompt"), {key for key in TEMPLATE_COLUMNS if row.get(key)}
    if not prompt:
        raise UserValueError(f"{name} is empty.")
    if isinstance(prompt, str) and not chat:
        if own:
            raise UserValueError(
                f"{name} is text to continue, which has no use for {min(own)!r}; give messages, or chat=True (--chat)."
            )
        return prompt, False
    if tokenizer.chat_template is None:
        raise UserValueError("The tokenizer has no chat template; give plain strings and chat=False.")
    try:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        tools = row.get("tools") or None
        continues = messages[-1].get("role") == "assistant"
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            "add_generation_prompt": not continues,
            "continue_final_message": continues,
            **template_options,
            **(row.get("chat_template_kwargs") or {}),
        }
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options)), True
    except (ValueError, TypeError, KeyError, TemplateError) as error:
        raise UserValueError(f"{name}: the chat template refuses it: {error}") from error


def _named(language: str, index: int) -> str:
    return f"Prompt {index} of {language!r}" if language else f"Prompt {index}"


def _check_lengths(config: PreTrainedConfig, settings: SamplingSettings, prompts: Mapping[str, Sequence[int]]) -> None:
    """ValueError for no prompt, a prompt of no token, or one that leaves no room for its response."""
    if not prompts:
        raise UserValueError("No prompts given.")
    longest = getattr(config, "max_position_embeddings", None)
    for name, tokens in prompts.items():
        if len(tokens) == 0:
            raise UserValueError(f"{name} has no tokens.")
        if longest is not None and len(tokens) + settings.max_new_tokens > longest:
            raise UserValueError(
                f"{name} has {len(tokens)} tokens; with max_new_tokens={settings.max_new_tokens} that exceeds the "
                f"{longest} positions of the model. Shorten the prompt or the response."
            )


@contextmanager
def _sampling(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, settings: SamplingSettings
) -> Iterator[Callable[[Sequence[Sequence[int]]], list[Response]]]:
    """Make `generate` follow `settings` and nothing else, and put everything back. Yields its form for a batch."""
    causal_lm = pretrained_model(model)
    defaults = causal_lm.generation_config
    eos = None if tokenizer is None else tokenizer.eos_token_id
    pad = None if tokenizer is None else tokenizer.pad_token_id
    # Any valid id pads: it is masked before a prompt, and cut off after the end of a response.
    padding_id: Any = next((given for given in (pad, eos) if given is not None), 0)
    end_ids = end_tokens(defaults, tokenizer)
    shape = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature else {}

    def generate(prompts: Sequence[Sequence[int]]) -> list[Response]:
        width, device = max(map(len, prompts)), causal_lm.device
        input_ids = torch.tensor([[padding_id] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        with finite_probabilities():
            output: Tensor = unwrapped(model).generate(input_ids=input_ids, attention_mask=mask)  # type: ignore[operator]
        return [until_end(tokens, end_ids) for tokens in output[:, width:].tolist()]

    # `generate` fills what a given configuration leaves open from the model's own one; hence the model's own is set.
    causal_lm.generation_config = GenerationConfig(
        do_sample=settings.temperature > 0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=padding_id,
        bos_token_id=defaults.bos_token_id,
        **shape,
    )
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices), evaluation_mode(model):
            torch.manual_seed(settings.seed)
            yield generate
    finally:
        causal_lm.generation_config = defaults


def end_tokens(defaults: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """The tokens that end a response: those of the model's generation defaults and that of the tokenizer."""
    return _as_set(defaults.eos_token_id) | _as_set(None if tokenizer is None else tokenizer.eos_token_id)


def until_end(tokens: Sequence[int], end_ids: frozenset[int]) -> Response:
    """The response in what was generated: its tokens up to the first end token."""
    end = next((position for position, token in enumerate(tokens) if token in end_ids), None)
    return Response(list(tokens[:end]), end is not None)


def stated_settings(model: nn.Module | SamplingEngine, settings: SamplingSettings) -> dict[str, Any]:
    """Settings that shaped the responses of a model, to be reported with them, and the engine if it is another one."""
    stated = settings.to_dict()
    if isinstance(model, nn.Module):
        return stated
    del stated["batch_size"]
    return {**stated, **model.stated()}


def _as_set(ids: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)
