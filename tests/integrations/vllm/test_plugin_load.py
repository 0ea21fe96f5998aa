"""What the plug-in refuses when it is loaded, the hash of compiled graphs, and the V2 model runner's hooks."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from integrations.vllm import plugin_cases as cases
from integrations.vllm.plugin_cases import KEY, edit

from qscope_posttrain.errors import UserImportError, UserValueError
from qscope_posttrain.rl.rollouts import vllm_plugin
from qscope_posttrain.rl.rollouts.vllm_steering import SteeringBuffers

HOOKED = {
    "Worker.load_model": "vllm.v1.worker.gpu_worker",
    "InputProcessor.process_inputs": "vllm.v1.engine.input_processor",
    "LLMEngine.collective_rpc": "vllm.v1.engine.llm_engine",
    "AsyncLLM.collective_rpc": "vllm.v1.engine.async_llm",
    "GPUModelRunner._prepare_inputs": "vllm.v1.worker.gpu_model_runner",
}


def owner_of(method):
    return getattr(importlib.import_module(HOOKED[method]), method.partition(".")[0])


@pytest.mark.parametrize("method", HOOKED)
@pytest.mark.parametrize("change", ["gone", "other parameters"])
def test_a_vllm_whose_internals_changed_is_refused_before_anything_is_changed(monkeypatch, method, change):
    owner, name = owner_of(method), method.partition(".")[2]
    monkeypatch.delattr(owner_of("Worker.load_model"), "qscope_put_directions", raising=False)
    monkeypatch.delattr(owner, name)
    if change == "other parameters" or hasattr(owner, name):  # A base class has some of them, too
        monkeypatch.setattr(owner, name, lambda self, batch: None, raising=False)
    others = {other: getattr(owner_of(other), other.partition(".")[2]) for other in HOOKED if other != method}
    with pytest.raises(
        UserImportError, match=f"has not the {HOOKED[method]}:{method.partition('.')[0]} that .*vLLM 0.31"
    ):
        vllm_plugin.register()
    assert all(getattr(owner_of(other), other.partition(".")[2]) is found for other, found in others.items())


def test_an_engine_with_speculative_decoding_does_not_start(make_model, tiny_tokenizer, tmp_path):
    _, folder = cases.saved_model(make_model, tmp_path, tiny_tokenizer)
    guessing = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    with pytest.raises(UserValueError, match="does not work with speculative decoding"):
        cases.engine(folder, speculative_config=guessing)


def test_an_engine_that_did_not_ask_for_it_is_as_without_the_plug_in(make_model, tiny_tokenizer, tmp_path, monkeypatch):
    """Another one of the process did: a judge that cannot be steered may run beside a steered training."""
    # Not speculative decoding: it imports numba, after which vLLM 0.31 starts no further engine in the process.
    _, folder = cases.saved_model(make_model, tmp_path, tiny_tokenizer)
    vllm_plugin.register()
    with pytest.raises(UserValueError, match="kv_sharing_fast_prefill"):
        cases.engine(folder, kv_sharing_fast_prefill=True)
    monkeypatch.delenv(vllm_plugin.ENVIRONMENT)
    with pytest.raises(RuntimeError, match="started without the plug-in"):  # of the directions that it is given then
        cases.engine(folder, kv_sharing_fast_prefill=True)


def test_a_graph_compiled_without_steering_is_not_found_again(make_model, tiny_tokenizer, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    _, folder = cases.saved_model(make_model, tmp_path, tiny_tokenizer)
    config = EngineArgs(model=str(folder), dtype="float32", max_model_len=256).create_engine_config()
    before = config.compute_hash()
    vllm_plugin.check_engine(config)
    after = config.compute_hash()
    vllm_plugin.check_engine(config)
    assert before != after == config.compute_hash()


def test_hooks_of_the_v2_runner_fill_what_its_batches_say(monkeypatch):
    """With methods of the runner that do nothing: the runner itself needs a GPU."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    batches = []
    fakes = {
        "add_requests": lambda self, scheduler_output: None,
        "finish_requests": lambda self, scheduler_output: None,
        "prepare_inputs": lambda self, scheduler_output: batches.pop(),
    }
    for name in fakes:
        monkeypatch.setattr(GPUModelRunner, name, getattr(GPUModelRunner, name))  # Restored after the test
    vllm_plugin._connect_v2()  # The real methods have the parameters that the hooks expect
    for name, fake in fakes.items():
        setattr(GPUModelRunner, name, fake)
    vllm_plugin._connect_v2()

    runner = object.__new__(GPUModelRunner)
    runner.qscope = SteeringBuffers(3, 8, 32, torch.device("cpu"))
    runner.qscope.put({"a": [1.0] * 8})
    steered = SimpleNamespace(extra_args={KEY: {"row": "r", "edits": [edit(start=1)]}})
    new = [
        SimpleNamespace(req_id="x", sampling_params=SimpleNamespace(extra_args=None), prompt_token_ids=[1, 2]),
        SimpleNamespace(req_id="y", sampling_params=steered, prompt_token_ids=[1, 2, 3]),
    ]

    def step(first, count):
        runner.qscope.steered += torch.from_numpy(runner.qscope._planned) - runner.qscope.steered  # As the operator
        batches.append(
            SimpleNamespace(
                req_ids=["x", "y"],
                num_computed_tokens_np=np.array([first, first]),
                num_scheduled_tokens=np.array([1, count]),
            )
        )
        runner.prepare_inputs(None)
        return runner.qscope.plan[1, :, 0].nonzero().squeeze(1).tolist()

    runner.add_requests(SimpleNamespace(scheduled_new_reqs=new))
    assert step(0, 3) == []
    assert step(3, 1) == []
    assert step(4, 1) == [1]
    runner.finish_requests(SimpleNamespace(finished_req_ids={"x"}, preempted_req_ids={"y"}))
    runner.add_requests(SimpleNamespace(scheduled_new_reqs=new[1:]))
    assert step(0, 6) == [5, 6]
    runner.qscope.steered.copy_(torch.from_numpy(runner.qscope._planned))
    assert runner.qscope.take_counts() == {"r": 2}
    runner.finish_requests(SimpleNamespace(finished_req_ids={"y"}))
    assert runner.qscope.running == set()
