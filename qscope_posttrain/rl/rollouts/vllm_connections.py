"""Connections of TRL to vLLM: an engine in this process, or a server. Both answer the same requests, row by row."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any, Protocol

from trl.import_utils import is_vllm_available

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.rl.rollouts.vllm_plugin import ENVIRONMENT, KEY, register

_SERVE = f"{ENVIRONMENT}=1 VLLM_SERVER_DEV_MODE=1 vllm serve ..."


@dataclass(frozen=True)
class Request:
    """Request for the completion of one row; all else is as TRL asks."""

    prompt: Mapping[str, Any]  # As vLLM takes it: prompt_token_ids, with images where there are any
    max_tokens: int
    min_tokens: int = 0
    steering: Mapping[str, Any] | None = None  # See `vllm_plugin.KEY`


@dataclass(frozen=True)
class Completion:
    """Tokens that vLLM generated for one row."""

    tokens: list[int]
    logps: list[float | None]  # Of each token, under the distribution that it was drawn from; None: not known


Generate = Callable[[Sequence[Request]], list[Completion]]
Rows = Callable[[list[Mapping[str, Any]], Generate], list[Completion]]
"""From the prompts of a batch, row by row, and a way to have them continued, to its completions"""


class Connection(Protocol):
    """The way to vLLM that TRL has chosen."""

    room: int  # Tokens of a prompt and its completion (max_model_len)

    def intercepted(self, rows: Rows) -> Any:
        """Inside the block, TRL's next call of vLLM returns what `rows` makes of its prompts."""

    def call(self, method: str, *args: Any) -> list[Any]:
        """The answers of all workers of the engine to a method of the plug-in."""


class Colocated:
    """vLLM in this process, on the devices of the training."""

    def __init__(self, generation: Any) -> None:
        self._llm = generation.llm
        self.room = int(self._llm.llm_engine.model_config.max_model_len)

    @contextmanager
    def intercepted(self, rows: Rows) -> Iterator[None]:
        """See `Connection`."""
        inner = self._llm.generate

        def intercepting(prompts: Any, sampling_params: Any, **options: Any) -> list[Any]:
            def generate(requests: Sequence[Request]) -> list[Completion]:
                params = [_sampling(sampling_params, request) for request in requests]
                outputs = inner([request.prompt for request in requests], params, **options)
                return [_completion(output.outputs[0]) for output in outputs]

            _abort_unfinished(self._llm.llm_engine)
            completions = rows(list(prompts), generate)
            return [_output(prompt, row) for prompt, row in zip(prompts, completions, strict=True)]

        with _replaced(self._llm, "generate", intercepting):
            yield

    def call(self, method: str, *args: Any) -> list[Any]:
        """See `Connection`."""
        try:
            return list(self._llm.collective_rpc(method, args=args))
        except (AttributeError, NotImplementedError) as error:
            raise RuntimeError(
                f"The engine in this process has no {method}: the plug-in for steering was not loaded in it ({error}). "
                f"Set {ENVIRONMENT}=1 before vLLM is first used in the process, and do not set VLLM_PLUGINS to others."
            ) from error


class Server:
    """vLLM behind HTTP, which TRL asks on the main process for the rows of all processes."""

    def __init__(self, generation: Any, model_name: str) -> None:
        """ValueError for a server that holds another model than `model_name`; an empty name is not compared."""
        self._client = generation.vllm_client
        config = self._client.get_server_info()["model_config"]
        held = config["model"]
        if model_name and PurePath(held).name != PurePath(model_name).name:
            raise UserValueError(
                f"The vLLM server at {self._client.base_url} holds the model {held!r}, and {model_name!r} is trained. "
                f"Start it with the model of the training: vllm serve {model_name} ..."
            )
        self.room = int(config["max_model_len"])
        # Others are not those of the distribution that the token was drawn from.
        self._logps_are_of_drawing = config["logprobs_mode"] == "processed_logprobs"

    @contextmanager
    def intercepted(self, rows: Rows) -> Iterator[None]:
        """See `Connection`."""
        inner = self._client.generate

        def intercepting(prompts: Any, features: Any = None, n: int = 1, **sampling: Any) -> dict[str, Any]:
            if features is not None:
                raise UserValueError(
                    "vllm_mode='server' makes negatives of text only, and the prompts have images. Use "
                    "vllm_mode='colocate', or set negatives_per_group=0 for plain DAPO."
                )

            def ask(requests: Sequence[Request]) -> list[Completion]:
                ids = [request.prompt["prompt_token_ids"] for request in requests]
                given = {**(sampling.get("generation_kwargs") or {}), **_body(requests[0])}
                answer = inner(prompts=ids, n=1, **{**sampling, "generation_kwargs": given})
                return self._answered(answer)

            def generate(requests: Sequence[Request]) -> list[Completion]:
                alike: dict[str, list[int]] = {}  # Rows that one call of the server can ask for
                for number, request in enumerate(requests):
                    alike.setdefault(json.dumps(_body(request), sort_keys=True), []).append(number)
                found: dict[int, Completion] = {}
                with ThreadPoolExecutor(max_workers=max(1, len(alike))) as pool:
                    answers = pool.map(ask, [[requests[number] for number in numbers] for numbers in alike.values()])
                    for numbers, answer in zip(alike.values(), answers, strict=True):
                        found.update(zip(numbers, answer, strict=True))
                return [found[number] for number in range(len(requests))]

            completions = rows([{"prompt_token_ids": ids} for ids in prompts for _ in range(n)], generate)
            return {
                "prompt_ids": list(prompts),
                "completion_ids": [row.tokens for row in completions],
                "logprobs": [[[logp] for logp in row.logps] for row in completions],
            }

        with _replaced(self._client, "generate", intercepting):
            yield

    def call(self, method: str, *args: Any) -> list[Any]:
        """See `Connection`."""
        import requests

        # Not in the client's session, which asks again for a while after an error.
        url = f"{self._client.base_url}/collective_rpc"
        answer = requests.post(url, json={"method": method, "args": list(args)})
        if answer.status_code == 200:
            return list(answer.json()["results"])
        missing = ("has no attribute", "is not implemented")  # in the words of its executors
        if answer.status_code == 404 or any(words in answer.text for words in missing):
            raise RuntimeError(
                f"The vLLM server at {self._client.base_url} has no {method}: the plug-in for steering is not loaded "
                f"in it. Install qscope_posttrain there and start it by `{_SERVE}`, or choose negative='seeded', which "
                f"needs no plug-in. It answered {answer.status_code}: {answer.text[:200]}"
            )
        raise RuntimeError(f"{method} failed in the vLLM server at {self._client.base_url}: {answer.text[:1000]}")

    def _answered(self, answer: Mapping[str, Any]) -> list[Completion]:
        scores = answer["logprobs"]
        known = scores is not None and self._logps_are_of_drawing
        return [
            Completion(list(tokens), [token[0] for token in scores[row]] if known else [None] * len(tokens))
            for row, tokens in enumerate(answer["completion_ids"])
        ]


@contextmanager
def plugin_enabled(config: Any) -> Iterator[None]:
    """Inside the block, an engine that a trainer of this config starts in its own process has the plug-in."""
    steered = config.use_vllm and config.vllm_mode == "colocate" and config.is_steered
    if not steered or not is_vllm_available():  # without vLLM TRL says what to install
        yield
        return
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = "1"
    try:
        # vLLM reads its plug-ins once in a process, which may be over.
        register()
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before


def load_weights_on_cpu(generation: Any) -> None:
    """Let TRL's object for a colocated vLLM pass new weights on by vLLM's own reload, where it runs on a CPU.

    There vLLM packs the weights of its linear layers for oneDNN and leaves nothing behind that TRL's way could write
    into. Elsewhere the object stays as it is.
    """
    from vllm.platforms import current_platform

    if generation.mode != "colocate" or not current_platform.is_cpu():
        return

    def sync_weights() -> None:
        weights = [(name, weight.detach().clone()) for name, weight in generation._iter_named_params()]
        generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        generation.llm.apply_model(_pack_embeddings)
        generation.llm.reset_prefix_cache()

    generation.sync_weights = sync_weights


def _pack_embeddings(model: Any) -> None:
    """Pack embeddings and heads from their weights again: of a head that is tied, the reload packs nothing."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            layer.quant_method.process_weights_after_loading(layer)


def _abort_unfinished(engine: Any) -> None:
    """Abort what an interrupted generation left in an engine: its rows would come out of the next one."""
    if left := list(engine.output_processor.request_states):
        engine.abort_request(left, internal=True)


def _sampling(base: Any, request: Request) -> Any:
    params = base.clone()
    params.max_tokens, params.min_tokens = request.max_tokens, request.min_tokens
    params.extra_args = None if request.steering is None else {KEY: dict(request.steering)}
    return params


def _body(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {"max_tokens": request.max_tokens, "min_tokens": request.min_tokens}
    if request.steering is not None:
        body["vllm_xargs"] = {KEY: json.dumps(request.steering)}
    return body


def _completion(output: Any) -> Completion:
    tokens = list(output.token_ids)
    return Completion(tokens, [scores[token].logprob for token, scores in zip(tokens, output.logprobs, strict=True)])


def _output(prompt: Mapping[str, Any], row: Completion) -> SimpleNamespace:
    """Output of a row as TRL reads it from vLLM. It takes a missing log-probability for NaN, as vLLM does."""
    scores = [
        {token: SimpleNamespace(logprob=math.nan if logp is None else logp, rank=1)}
        for token, logp in zip(row.tokens, row.logps, strict=True)
    ]
    completion = SimpleNamespace(token_ids=row.tokens, logprobs=scores)
    return SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[completion])


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of one object, and give it back what it had, which is usually that of its class."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
