"""Steered rows among others, in an eager engine: tokens, counts, ordinary rows, refusals, weights, prefix cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from integrations.vllm import plugin_cases as cases
from integrations.vllm.plugin_cases import KEY, edit

UNSTEERED = """
import json, sys
from vllm import LLM, SamplingParams
folder, ids, lengths = json.loads(sys.argv[1])
llm = LLM(model=folder, dtype="float32", max_model_len=256, seed=0, max_num_seqs=16, enforce_eager=True)
asked = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=0) for n in lengths]
outputs = llm.generate([{"prompt_token_ids": row} for row in ids], asked, use_tqdm=False)
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker
methods = [InputProcessor.__init__, InputProcessor.process_inputs, LLMEngine.collective_rpc,
           GPUModelRunner._prepare_inputs, Worker.load_model]
print("RESULT", json.dumps({
    "tokens": [list(o.outputs[0].token_ids) for o in outputs],
    "chances": [[next(iter(p.values())).logprob for p in o.outputs[0].logprobs] for o in outputs],
    "imported": sorted(name for name in sys.modules if name.startswith("qscope_posttrain")),
    "patched": [m.__qualname__ for m in methods if "qscope" in m.__code__.co_filename],
    "methods": [name for name in dir(Worker) if "qscope" in name],
}))
"""


@pytest.fixture(scope="module")
def model_and_folder(make_model, tiny_tokenizer, tmp_path_factory):
    return cases.saved_model(make_model, tmp_path_factory.mktemp("qwen3"), tiny_tokenizer)


@pytest.fixture(scope="module")
def model(model_and_folder):
    return model_and_folder[0]


@pytest.fixture(scope="module")
def ids(tiny_tokenizer, texts):
    return cases.prompts(tiny_tokenizer, texts)


@pytest.fixture(scope="module")
def llm(model_and_folder):
    return cases.engine(model_and_folder[1])


@pytest.fixture(autouse=True)
def counts_taken(llm):
    llm.collective_rpc("qscope_take_counts")


@pytest.mark.promise("vLLM steers the rows that ask for it and no other")
def test_a_mixed_batch_has_the_tokens_of_transformers_and_its_counts(llm, model, ids):
    tokens, _ = cases.generate(llm, ids)
    counts = llm.collective_rpc("qscope_take_counts")
    plain, _ = cases.generate(llm, ids, [None] * len(ids))
    assert tokens == cases.in_transformers(model, ids)
    assert all((each is None) == (row == other) for each, row, other in zip(cases.EDITS, tokens, plain, strict=True))
    assert counts == [cases.expected_counts()]
    assert llm.collective_rpc("qscope_take_counts") == [{}]


@pytest.mark.promise("vLLM steers the rows that ask for it and no other")
def test_ordinary_rows_are_those_of_an_engine_that_knows_no_steering(llm, ids, model_and_folder):
    """That engine runs in a process of its own, where the plug-in is installed, not asked for, and does nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "QSCOPE_VLLM"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", UNSTEERED, json.dumps([str(model_and_folder[1]), ids, cases.LENGTHS])],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    other = json.loads(done.stdout.partition("RESULT")[2])
    allowed = {"qscope_posttrain", "qscope_posttrain.errors", "qscope_posttrain.rl", "qscope_posttrain.rl.rollouts"}
    assert set(other["imported"]) <= allowed | {"qscope_posttrain.rl.rollouts.vllm_plugin"}
    assert other["patched"] == other["methods"] == []
    tokens, chances = cases.generate(llm, ids)
    ordinary = [place for place, each in enumerate(cases.EDITS) if each is None]
    assert [tokens[place] for place in ordinary] == [other["tokens"][place] for place in ordinary]
    assert [chances[place] for place in ordinary] == [other["chances"][place] for place in ordinary]


@pytest.mark.parametrize(
    ("edits", "options", "reason"),
    [
        ([edit("c")], {}, "unknown direction 'c'; held: a, b"),
        ([edit(layer=3)], {}, "layer must be one of 0 to 2; got 3"),
        ([edit() | {"mode": "clamp"}], {}, "by mode 'add' only; got 'clamp'"),
        ([edit() | {"strenght": 1.0}], {}, "unknown: strenght"),
        ([edit()] * 5, {}, "4 edits at a layer; got 5"),
        ([edit()], {"n": 2, "temperature": 1.0}, "n=1 and a row name of its own"),
        (None, {"extra_args": {"qscope_stering": {}}}, "unknown extra_args qscope_stering"),
        (None, {"extra_args": {KEY: "{"}}, "must be a dict or JSON"),
    ],
)
def test_a_request_that_cannot_be_steered_is_refused_alone(llm, ids, edits, options, reason):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=reason):
        llm.generate([{"prompt_token_ids": ids[0]}], [cases.parameters(edits, **options)], use_tqdm=False)
    asked = [cases.parameters(None), cases.parameters(edits, **options)]
    with pytest.raises(VLLMValidationError, match=reason):
        llm.generate([{"prompt_token_ids": row} for row in ids[:2]], asked, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    tokens, _ = cases.generate(llm, ids[:1], [[edit()]], [5])
    assert len(tokens[0]) == 5
    assert llm.collective_rpc("qscope_take_counts") == [{"0": 4}]


def test_directions_that_do_not_fit_the_model_are_refused(llm):
    with pytest.raises(ValueError, match="'c' must have 64 finite entries"):
        cases.put(llm, {"c": torch.ones(3)})
    assert cases.put(llm, cases.DIRECTIONS) == [
        {"layers": 3, "hidden_size": 64, "model": llm.llm_engine.model_config.model, "runner": "v1"}
    ]


def test_the_steering_of_a_request_may_be_json(llm, ids):
    steering = {"row": "0", "edits": [edit()]}
    expected = cases.generate(llm, ids[:1], [[edit()]], [8])[0]
    asked = cases.parameters(None, 8, extra_args={KEY: json.dumps(steering)})
    output = llm.generate([{"prompt_token_ids": ids[0]}], [asked], use_tqdm=False)[0]
    assert [list(output.outputs[0].token_ids)] == expected


def test_new_weights_leave_directions_and_steering_in_place(llm, model, ids):
    old = {name: value.clone() for name, value in model.state_dict().items()}
    new = {name: value + 0.02 * torch.randn_like(value) for name, value in old.items()}
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(new.items())})
        model.load_state_dict(new)
        assert cases.generate(llm, ids)[0] == cases.in_transformers(model, ids)
        assert llm.collective_rpc("qscope_take_counts") == [cases.expected_counts()]
    finally:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(old.items())})
        model.load_state_dict(old)


def test_cached_blocks_of_a_steered_row_serve_no_other_request(llm, model, ids, monkeypatch):
    """Prompt and completion of a steered row become the prompt of an ordinary one. Without a salt of its own the
    steered row's blocks are found in the cache, with its steered keys and values in them."""
    steered, edits, lengths = [[edit(strength=12.0)]], [None], [6]
    llm.llm_engine.reset_prefix_cache()
    made, _ = cases.generate(llm, ids[:1], steered, [90])
    row = ids[0] + made[0][:80]
    tokens, clean = cases.generate(llm, [row], edits, lengths)
    assert tokens == cases.in_transformers(model, [row], edits, lengths)

    from qscope_posttrain.rl.rollouts import vllm_plugin

    def without_salt(request, layers, directions):
        salt = request.cache_salt
        admit(request, layers, directions)
        request.cache_salt = salt

    admit = vllm_plugin._admit
    monkeypatch.setattr(vllm_plugin, "_admit", without_salt)
    llm.llm_engine.reset_prefix_cache()
    cases.generate(llm, ids[:1], steered, [90])
    _, leaked = cases.generate(llm, [row], edits, lengths)
    assert leaked != clean, "the test has lost its point: nothing leaks without the salt"
    llm.llm_engine.reset_prefix_cache()
    assert cases.generate(llm, [row], edits, lengths)[1] == clean
