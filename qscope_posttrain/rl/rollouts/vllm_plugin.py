"""vLLM plug-in: feature steering of single requests, by their `extra_args`.

vLLM loads `register` in each of its processes (entry point `vllm.general_plugins`). Unless the environment says
`QSCOPE_VLLM=1` it does nothing and imports nothing. Otherwise it changes classes of vLLM:

- the front end checks the steering of a request when it is admitted, and keeps its blocks out of others' prefix cache;
- the worker passes the output of each decoder layer through one operator, from before profiling and graph capture on;
- the model runner writes, before each step, which tokens of the batch get which directions;
- `collective_rpc` finds `qscope_put_directions` and `qscope_take_counts`.

Written against vLLM 0.31 and run there on a CPU, by the V1 model runner. The V2 model runner, tensor parallelism and
CUDA graphs follow its source and were never run.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserError, UserImportError, UserValueError

if TYPE_CHECKING:
    from qscope_posttrain.rl.rollouts.vllm_steering import SteeringBuffers

ENVIRONMENT = "QSCOPE_VLLM"
"""Environment variable that turns the plug-in on, by "1"."""
V2_ENVIRONMENT = "QSCOPE_VLLM_V2"
"""Environment variable that allows the V2 model runner, by "1"."""
KEY = "qscope_steering"
"""Where `SamplingParams.extra_args` (over HTTP: `vllm_xargs`) holds the steering of a request."""


def register() -> None:
    """Connect steering to vLLM if `QSCOPE_VLLM=1`; a second call does nothing.

    Raises:
        UserImportError: vLLM lacks a method that is to be changed, or it has other parameters than expected.
    """
    asked = os.environ.get(ENVIRONMENT, "")
    if asked in ("", "0"):
        return
    if asked != "1":
        raise UserValueError(f"{ENVIRONMENT} must be 1 or 0; got {asked!r}.")
    worker = _class("vllm.v1.worker.gpu_worker:Worker", load_model=("load_dummy_weights",))
    if hasattr(worker, "qscope_put_directions"):
        return
    inputs = _class(
        "vllm.v1.engine.input_processor:InputProcessor",
        __init__=("vllm_config",),
        process_inputs=("request_id", "prompt", "params"),
    )
    call = ("method", "timeout", "args", "kwargs")
    engine = _class("vllm.v1.engine.llm_engine:LLMEngine", collective_rpc=call)
    asynchronous = _class("vllm.v1.engine.async_llm:AsyncLLM", collective_rpc=call)
    runner = _class(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner", _prepare_inputs=("scheduler_output", "num_scheduled_tokens")
    )
    if _allows_v2():
        _connect_v2()
    _replace(inputs, "__init__", _checked_init)
    _replace(inputs, "process_inputs", _admitting)
    _replace(engine, "collective_rpc", _noting_directions)
    _replace(asynchronous, "collective_rpc", _noting_directions_async)
    _replace(worker, "load_model", _steerable)
    _replace(runner, "_prepare_inputs", _filling)
    worker.qscope_put_directions = _put_directions
    worker.qscope_take_counts = _take_counts


def _class(path: str, **methods: tuple[str, ...]) -> Any:
    """Import a class of vLLM and check that its methods begin with these parameters."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
        for method, expected in methods.items():
            parameters = tuple(inspect.signature(getattr(found, method)).parameters)[1:]
            if parameters[: len(expected)] != expected:
                raise AttributeError(f"{method} has the parameters {', '.join(parameters)}")
    except (ImportError, AttributeError) as error:
        import vllm

        raise UserImportError(
            f"{ENVIRONMENT}=1, but vLLM {vllm.__version__} has not the {path} that steering connects to ({error}). "
            f"Use vLLM 0.31, or unset {ENVIRONMENT}."
        ) from error
    return found


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def _is_on() -> bool:
    """Whether an engine that starts now is to be steerable; others of a process in which the plug-in is stay as is."""
    return os.environ.get(ENVIRONMENT) == "1"


def _allows_v2() -> bool:
    return os.environ.get(V2_ENVIRONMENT) == "1"


# ---- front end ----


def check_engine(config: Any) -> None:
    """Refuse an engine in which steering cannot work, or where nobody has seen it work.

    Args:
        config (VllmConfig): Of the engine. Its hash changes, so that no graph compiled without the plug-in is used.

    Raises:
        UserValueError: something in it does not go with steering.
    """
    parallel = config.parallel_config
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism inside of one engine; start one engine per replica": parallel.data_parallel_size > 1,
        "context parallelism": max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size) > 1,
        "micro-batches (dual batch overlap)": parallel.use_ubatching,
        "KV transfer": config.kv_transfer_config is not None,
        "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
        "models that do not generate token by token": config.model_config.runner_type != "generate"
        or config.model_config.is_diffusion,
        f"the V2 model runner, which nobody has verified; set VLLM_USE_V2_MODEL_RUNNER=0, or {V2_ENVIRONMENT}=1 to try"
        " it": config.use_v2_model_runner and not _allows_v2(),
        "an additional_config that is no dict": not isinstance(config.additional_config, dict),
    }
    found = [what for what, applies in refused.items() if applies]
    if found:
        raise UserValueError(
            f"{ENVIRONMENT}=1: steering does not work with {'; nor with '.join(found)}. Change that, or unset "
            f"{ENVIRONMENT}."
        )
    config.additional_config = {**config.additional_config, KEY: 1}


def _checked_init(original: Any) -> Any:
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if _is_on():
            check_engine(vllm_config)
            self.qscope_directions = ()
        original(self, vllm_config, *args, **kwargs)

    return init


def _admitting(original: Any) -> Any:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        request = original(self, *args, **kwargs)
        try:
            held = getattr(self, "qscope_directions", None)
            _admit(request, self.model_config.hf_text_config.num_hidden_layers, held)
        except UserError as error:
            raise VLLMValidationError(f"{KEY}: {error}") from error
        return request

    return process_inputs


def _admit(request: Any, layers: int, directions: tuple[str, ...] | None) -> None:
    """Check a request's steering, and give its blocks a salt of their own: the cached state of a steered token is not
    that of the same token in another request, or at another distance from the prompt's end. `directions` is None in an
    engine that was started without the plug-in."""
    from qscope_posttrain.rl.rollouts.vllm_steering import parse_request

    given = getattr(request.sampling_params, "extra_args", None) or {}
    misspelled = [key for key in given if key.startswith("qscope") and key != KEY]
    if misspelled:
        raise UserValueError(f"unknown extra_args {', '.join(misspelled)}; steering is in {KEY!r}.")
    if KEY not in given:
        return
    if directions is None:
        raise UserValueError(f"this engine was started without the plug-in; start it again with {ENVIRONMENT}=1.")
    parse_request(given[KEY], layers, _prompt_length(request), directions)
    if request.sampling_params.n != 1:
        raise UserValueError(f"a steered request has n=1 and a row name of its own; got n={request.sampling_params.n}.")
    if request.resumable:
        raise UserValueError("a request whose prompt grows (resumable) cannot be steered.")
    request.cache_salt = f"{request.cache_salt or ''}{KEY}-{uuid.uuid4().hex}"


def _prompt_length(request: Any) -> int:
    return len(request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids)


def _directions_of(method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    if method != "qscope_put_directions":
        return None
    sent = args[0] if args else (kwargs or {}).get("directions")
    return tuple(sent) if isinstance(sent, Mapping) else ()


def _noting_directions(original: Any) -> Any:
    def collective_rpc(self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> Any:
        names = _directions_of(method, args, kwargs)
        result = original(self, method, timeout, args, kwargs)
        if names is not None:
            self.input_processor.qscope_directions = names
        return result

    return collective_rpc


def _noting_directions_async(original: Any) -> Any:
    async def collective_rpc(self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> Any:
        names = _directions_of(method, args, kwargs)
        result = await original(self, method, timeout, args, kwargs)
        if names is not None:
            self.input_processor.qscope_directions = names
        return result

    return collective_rpc


# ---- worker ----


def _steerable(original: Any) -> Any:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        from qscope_posttrain.rl.rollouts.vllm_steering import make_steerable

        result = original(self, *args, **kwargs)
        if not _is_on():
            return result
        # Outside of the pool of the weights: a sleeping engine gives that back.
        runner, text = self.model_runner, self.model_config.hf_text_config
        runner.qscope = make_steerable(
            runner.get_model(), text.num_hidden_layers, text.hidden_size, runner.max_num_tokens, runner.device
        )
        return result

    return load_model


def _filling(original: Any) -> Any:
    def prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)
        steering, batch = getattr(self, "qscope", None), self.input_batch
        if steering is None:  # Started without the plug-in: its front end admits no steered request
            return result
        steering.remove(steering.running - self.requests.keys())
        _take_up(steering, scheduler_output.scheduled_new_reqs)
        steering.fill(batch.req_id_to_index, batch.num_computed_tokens_cpu[: batch.num_reqs], num_scheduled_tokens)
        return result

    return prepare_inputs


def _take_up(steering: SteeringBuffers, new: Any) -> None:
    for request in new:
        given = getattr(request.sampling_params, "extra_args", None) or {}
        if KEY in given:
            steering.add(request.req_id, given[KEY], _prompt_length(request))


def _connect_v2() -> None:
    """Connect the V2 model runner; written against the source of vLLM 0.31 and never run on a GPU."""
    runner = _class(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        add_requests=("scheduler_output",),
        finish_requests=("scheduler_output",),
        prepare_inputs=("scheduler_output",),
    )
    _replace(runner, "add_requests", _adding_v2)
    _replace(runner, "finish_requests", _finishing_v2)
    _replace(runner, "prepare_inputs", _filling_v2)


def _adding_v2(original: Any) -> Any:
    def add_requests(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        if hasattr(self, "qscope"):
            _take_up(self.qscope, scheduler_output.scheduled_new_reqs)

    return add_requests


def _finishing_v2(original: Any) -> Any:
    def finish_requests(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        if hasattr(self, "qscope"):
            self.qscope.remove(scheduler_output.finished_req_ids)  # Preempted ones come back by add_requests

    return finish_requests


def _filling_v2(original: Any) -> Any:
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, *args, **kwargs)
        if hasattr(self, "qscope"):
            places = {request: place for place, request in enumerate(batch.req_ids)} if self.qscope.running else {}
            self.qscope.fill(places, batch.num_computed_tokens_np, batch.num_scheduled_tokens)
        return batch

    return prepare_inputs


def _put_directions(self: Any, directions: dict[str, list[float]]) -> dict[str, Any]:
    """Replace the engine's directions, and describe its model."""
    steering = _steering_of(self)
    steering.put(directions)
    return {
        "layers": len(steering.plan),
        "hidden_size": steering.table.shape[1],
        "model": self.model_config.model,
        "runner": "v2" if self.use_v2_model_runner else "v1",
    }


def _take_counts(self: Any, read: dict[str, int] | None = None) -> dict[str, int]:
    """Return the steered tokens by row since the last call; see `SteeringBuffers.take_counts`."""
    return _steering_of(self).take_counts(read)


def _steering_of(worker: Any) -> SteeringBuffers:
    steering: SteeringBuffers | None = getattr(worker.model_runner, "qscope", None)
    if steering is None:
        raise RuntimeError(f"This engine was started without the plug-in; start it again with {ENVIRONMENT}=1.")
    return steering
