"""What a request may ask for, the plans of steps, and the counts; without vLLM."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.kernels.steering import EDITS
from qscope_posttrain.rl.rollouts import vllm_plugin
from qscope_posttrain.rl.rollouts.vllm_steering import DIRECTIONS, SteeringBuffers, make_steerable, parse_request

LAYERS, WIDTH, TOKENS = 3, 8, 32
EDIT = {"direction": "a", "layer": 1, "strength": 2.5, "start": 2, "length": 3, "mode": "add"}


def asking(*edits, row="r", **changes):
    return {"row": row, "edits": [EDIT | changes, *edits]}


def steering(names=("a", "b")):
    made = SteeringBuffers(LAYERS, WIDTH, TOKENS, torch.device("cpu"))
    made.put({name: [float(place + 1)] * WIDTH for place, name in enumerate(names)})
    return made


def run(made, layer, tokens):
    """A step of the model at one layer: what the operator reads there."""
    from qscope_posttrain.kernels.steering import steer_planned_

    hidden = torch.zeros(tokens, WIDTH)
    for each in range(LAYERS):
        states = hidden if each == layer else torch.zeros(tokens, WIDTH)
        steer_planned_(states, None, made.table, made.plan[each], made.steered[each : each + 1])
    return hidden[:, 0].tolist()


def fill(made, *rows):
    """A step of (request, first position, tokens)."""
    places = {name: place for place, (name, *_) in enumerate(rows)}
    made.fill(places, np.array([row[1] for row in rows]), np.array([row[2] for row in rows]))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("{", "must be a dict or JSON"),
        (3, "must be a dict; got 3"),
        ({"row": "r"}, "missing: edits"),
        ({"row": 3, "edits": [EDIT]}, "row must be a string"),
        ({"row": "r", "edits": []}, "at least one edit"),
        ({"row": "r", "edits": [EDIT], "layers": 3}, "unknown: layers"),
        (asking(strenght=3), "unknown: strenght"),
        ({"row": "r", "edits": [{"layer": 1}]}, "missing: direction, length, start, strength"),
        (asking(direction="aa"), "unknown direction 'aa'; held: a, b. Did you mean 'a'"),
        (asking(layer=3), "layer must be one of 0 to 2; got 3"),
        (asking(layer=-1), "layer must be a whole number from 0; got -1"),
        (asking(layer=True), "layer must be a whole number"),
        (asking(start=1.5), "start must be a whole number"),
        (asking(length=-1), "length must be a whole number"),
        (asking(strength=float("inf")), "strength must be a finite number"),
        (asking(strength="3"), "strength must be a finite number"),
        (asking(mode="clamp"), "by mode 'add' only; got 'clamp'"),
        (asking(*[EDIT] * EDITS), f"{EDITS} edits at a layer; got {EDITS + 1} at layer 1"),
    ],
)
def test_what_cannot_be_understood_is_refused(raw, reason):
    with pytest.raises(UserValueError, match=reason):
        parse_request(raw, LAYERS, 5, ["a", "b"])


def test_edits_are_read_from_a_dict_or_from_json():
    raw = asking(EDIT | {"direction": "b", "length": None})
    row, (first, second) = parse_request(raw, LAYERS, 5, ["a", "b"])
    assert (row, first.first, first.end, second.direction) == ("r", 7, 10, "b")
    assert second.end == 2**31 - 1
    assert parse_request(json.dumps(raw), LAYERS, 5, ["a", "b"]) == (row, (first, second))


@pytest.mark.parametrize(
    ("directions", "reason"),
    [
        ([[1.0] * WIDTH], "must be a dict"),
        ({"a": [1.0]}, "'a' must have 8 finite entries"),
        ({"a": [0.0] * WIDTH}, "not all 0"),
        ({"a": [float("nan")] * WIDTH}, "8 finite entries"),
        ({str(n): [1.0] * WIDTH for n in range(DIRECTIONS + 1)}, f"{DIRECTIONS + 1} directions; {DIRECTIONS} of"),
    ],
)
def test_directions_that_do_not_fit_are_refused_and_the_old_ones_stay(directions, reason):
    made = steering()
    with pytest.raises(UserValueError, match=reason):
        made.put(directions)
    made.add("x", asking(), 0)


def test_tokens_are_steered_by_their_distance_from_the_prompts_end():
    made = steering()
    made.add("x", asking(EDIT | {"direction": "b", "start": 4, "length": None}), 5)
    fill(made, ("plain", 0, 2), ("x", 0, 6))
    assert run(made, 1, 8) == [0] * 8
    fill(made, ("x", 6, 1), ("plain", 2, 1))
    assert run(made, 1, 2) == [0, 0]
    # Positions 7 to 9 by "a" (one times 2.5), from 9 on by "b" (two times 2.5).
    fill(made, ("plain", 3, 2), ("x", 7, 4))
    assert run(made, 1, 8) == [0, 0, 2.5, 2.5, 7.5, 5.0, 0, 0]
    assert made.take_counts() == {"r": 4}
    fill(made, ("plain", 5, 1))
    assert run(made, 1, 8) == [0] * 8
    assert made.take_counts() == {}


def test_a_position_counts_once_per_layer_however_often_it_is_computed():
    made = steering()
    made.add("x", asking(EDIT | {"layer": 2, "start": 0, "length": None}), 5)
    for first in (0, 6, 7, 8):
        count = 6 if first == 0 else 1
        fill(made, ("x", first, count))
        run(made, 1, count)
    made.add("x", asking(), 5)  # As an engine says that reports a preempted request again
    fill(made, ("x", 0, 9))
    run(made, 1, 9)
    fill(made, ("x", 9, 1))
    run(made, 1, 1)
    assert made.take_counts() == {"r": 3 + 5}
    fill(made, ("x", 10, 1))
    run(made, 1, 1)
    made.remove(["x"])
    assert made.take_counts() == {"r": 1}
    assert made.take_counts() == {}


def test_a_final_token_that_was_read_ahead_can_be_left_out():
    made = steering()
    made.add("x", asking(length=None), 5)
    fill(made, ("x", 0, 11))
    run(made, 1, 11)
    assert made.take_counts({"r": 5, "other": 3}) == {"r": 3}  # Positions 7 to 9 of 7 to 10


def test_rows_are_told_apart_and_one_that_ended_early_counts_0():
    made = steering()
    made.add("x", asking(row="first"), 5)
    made.add("y", asking(row="second"), 2)
    fill(made, ("x", 0, 5), ("y", 0, 5))
    run(made, 1, 10)
    assert made.take_counts() == {"first": 0, "second": 1}


def test_an_operator_that_did_not_run_is_noticed():
    made = steering()
    made.add("x", asking(), 0)
    fill(made, ("x", 0, 4))
    with pytest.raises(RuntimeError, match=r"planned by layer \[0, 2, 0\].*changed \[0, 0, 0\]"):
        made.take_counts()


def test_running_requests_keep_the_directions_that_they_began_with():
    made = steering()
    made.add("x", asking(), 0)
    made.put({"a": [7.0] * WIDTH})
    made.add("y", asking(), 0)
    fill(made, ("x", 2, 1), ("y", 2, 1))
    assert run(made, 1, 2) == [2.5, 17.5]
    made.remove(["x", "y"])
    made.put({str(n): [1.0] * WIDTH for n in range(DIRECTIONS)})


class _Layer(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, hidden):
        return self.output(hidden)


def a_model(output=lambda hidden: hidden * 1, layers=LAYERS, lists=1):
    model = nn.Module()
    for place in range(lists):
        part = nn.Module()
        part.layers = nn.ModuleList(_Layer(output) for _ in range(layers))
        setattr(model, f"part{place}", part)
    return model


@pytest.mark.parametrize(
    ("output", "read"),
    [
        (lambda hidden: hidden * 1, lambda output: output),
        (lambda hidden: (hidden * 1, hidden * 2), lambda output: output[0] + output[1]),
        (lambda hidden: (hidden * 1, None), lambda output: output[0]),
    ],
)
def test_layers_outputs_are_steered_as_the_stream_that_they_stand_for(output, read):
    model = a_model(output)
    made = make_steerable(model, LAYERS, WIDTH, TOKENS, torch.device("cpu"))
    made.put({"a": [1.0] * WIDTH})
    made.add("x", asking(start=0), 1)
    fill(made, ("x", 0, 2))
    hidden = torch.randn(2, WIDTH)
    before = [read(output(hidden)), read(model.part0.layers[0](hidden))]
    after = read(model.part0.layers[1](hidden))
    assert torch.equal(before[0], before[1])
    assert torch.equal(after[0], before[0][0])
    torch.testing.assert_close(after[1], before[0][1] + 2.5)
    assert made.take_counts() == {"r": 1}


@pytest.mark.parametrize("model", [a_model(layers=2), a_model(lists=2), nn.Module()])
def test_a_model_without_one_list_of_its_layers_is_refused(model):
    with pytest.raises(UserValueError, match="expected one list of 3 decoder layers"):
        make_steerable(model, LAYERS, WIDTH, TOKENS, torch.device("cpu"))


@pytest.mark.parametrize(
    "output", [lambda hidden: hidden[None], lambda hidden: (hidden, [hidden]), lambda hidden: (hidden, hidden, hidden)]
)
def test_a_layer_that_returns_something_else_is_refused(output):
    model = a_model(output)
    make_steerable(model, LAYERS, WIDTH, TOKENS, torch.device("cpu"))
    with pytest.raises(UserValueError, match="or two of them that add up"):
        model.part0.layers[0](torch.zeros(2, WIDTH))


def a_request(prompt=(1, 2, 3), salt=None, extra_args=None, resumable=False, n=1):
    """What of vLLM's EngineCoreRequest the front end looks at."""
    parameters = SimpleNamespace(extra_args=extra_args, n=n)
    return SimpleNamespace(
        prompt_token_ids=prompt, sampling_params=parameters, cache_salt=salt, resumable=resumable, request_id="x"
    )


def test_every_steered_request_has_a_salt_of_its_own_and_others_keep_theirs():
    requests = [a_request(extra_args={vllm_plugin.KEY: asking()}, salt=salt) for salt in (None, None, "mine", "yours")]
    for request in requests:
        vllm_plugin._admit(request, LAYERS, ("a",))
    assert len({request.cache_salt for request in requests}) == 4
    assert requests[2].cache_salt.startswith("mine")
    for request in (a_request(), a_request(salt="mine"), a_request(extra_args={"other": 1})):
        before = request.cache_salt
        vllm_plugin._admit(request, LAYERS, ("a",))
        assert request.cache_salt == before


@pytest.mark.parametrize(
    ("changes", "directions", "reason"),
    [
        ({}, None, "started without the plug-in.*QSCOPE_VLLM=1"),
        ({}, (), "unknown direction 'a'; held: none; send them by qscope_put_directions first"),
        ({"resumable": True}, ("a",), "a request whose prompt grows"),
        ({"n": 4}, ("a",), "n=1 and a row name of its own; got n=4"),
        ({"extra_args": {"qscope": 1}}, ("a",), "unknown extra_args qscope; steering is in 'qscope_steering'"),
    ],
)
def test_requests_are_refused_at_admission(changes, directions, reason):
    request = a_request(**{"extra_args": {vllm_plugin.KEY: asking()}, **changes})
    with pytest.raises(UserValueError, match=reason):
        vllm_plugin._admit(request, LAYERS, directions)


def test_an_engine_without_the_plug_in_takes_ordinary_requests_and_has_no_directions():
    vllm_plugin._admit(a_request(), LAYERS, None)
    for call in (lambda worker: vllm_plugin._put_directions(worker, {}), vllm_plugin._take_counts):
        with pytest.raises(RuntimeError, match=r"started without the plug-in.*QSCOPE_VLLM=1"):
            call(SimpleNamespace(model_runner=SimpleNamespace()))


def an_engine(**changes):
    """What of vLLM's VllmConfig is looked at."""
    parallel = dict.fromkeys(["pipeline", "data", "prefill_context", "decode_context"], 1)
    parts = {
        "parallel_config": {f"{name}_parallel_size": size for name, size in parallel.items()}
        | {"use_ubatching": False},
        "cache_config": {"kv_sharing_fast_prefill": False},
        "model_config": {"runner_type": "generate", "is_diffusion": False},
    }
    whole = {
        "speculative_config": None,
        "kv_transfer_config": None,
        "use_v2_model_runner": False,
        "additional_config": {},
    }
    for name, value in changes.items():
        next((part for part in parts.values() if name in part), whole)[name] = value
    return SimpleNamespace(**whole, **{name: SimpleNamespace(**part) for name, part in parts.items()})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"speculative_config": 1}, "speculative decoding"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"data_parallel_size": 2}, "data parallelism inside of one engine; start one engine per replica"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"use_ubatching": True}, "micro-batches"),
        ({"kv_transfer_config": 1}, "KV transfer"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"runner_type": "pooling"}, "models that do not generate token by token"),
        ({"is_diffusion": True}, "models that do not generate token by token"),
        ({"use_v2_model_runner": True}, "V2 model runner.*set VLLM_USE_V2_MODEL_RUNNER=0, or QSCOPE_VLLM_V2=1"),
        ({"additional_config": None}, "an additional_config that is no dict"),
        ({"speculative_config": 1, "pipeline_parallel_size": 2}, "speculative decoding; nor with pipeline"),
    ],
)
def test_engines_in_which_steering_cannot_work_are_refused(changes, reason):
    with pytest.raises(UserValueError, match=reason):
        vllm_plugin.check_engine(an_engine(**changes))


def test_the_v2_runner_can_be_tried_and_the_hash_of_an_engine_knows_of_steering(monkeypatch):
    monkeypatch.setenv(vllm_plugin.V2_ENVIRONMENT, "1")
    engine = an_engine(use_v2_model_runner=True, additional_config={"mine": 2})
    vllm_plugin.check_engine(engine)
    assert engine.additional_config == {"mine": 2, vllm_plugin.KEY: 1}


def test_the_plug_in_does_nothing_unless_asked(monkeypatch):
    for value in (None, "", "0"):
        if value is None:
            monkeypatch.delenv(vllm_plugin.ENVIRONMENT, raising=False)
        else:
            monkeypatch.setenv(vllm_plugin.ENVIRONMENT, value)
        vllm_plugin.register()
    monkeypatch.setenv(vllm_plugin.ENVIRONMENT, "true")
    with pytest.raises(UserValueError, match="QSCOPE_VLLM must be 1 or 0; got 'true'"):
        vllm_plugin.register()
