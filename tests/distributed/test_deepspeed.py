"""The launch files of DeepSpeed's ZeRO, on CPUs: `make test-deepspeed`, in an environment of its own.

ZeRO shards a model that is trained, so `sft` and `grpo` are what it is for; `features find` and `sae train` train no
model, and run under its files as under any other.
"""

from __future__ import annotations

import itertools

import pytest
from distributed.launches import Inputs, job, log_of, run_jobs

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed here: make test-deepspeed")

FILES = {
    "zero2": ("zero2.yaml", 1),
    "zero3": ("zero3.yaml", 1),
    "zero3, two machines": ("multi_node_zero3.yaml", 2),
}
RUNS = list(itertools.product(("sft", "grpo"), FILES))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def launched(inputs):
    jobs = {}
    for command, name in RUNS:
        config, machines = FILES[name]
        jobs[f"{command} {name}"] = job(config, inputs.arguments(command, f"{command} {name}", 2), machines=machines)
    for command in ("sft", "grpo"):
        jobs[f"{command} ddp"] = job("ddp.yaml", inputs.arguments(command, f"{command} ddp", 2))
    for command in ("features find", "sae train"):
        jobs[command] = job("zero2.yaml", inputs.arguments(command, command, 2))
    return run_jobs(inputs.folder, jobs)


@pytest.mark.promise("ZeRO-2 and ZeRO-3, on one machine and on two, train `qscope sft` and `qscope grpo` as DDP does.")
@pytest.mark.parametrize(("command", "name"), RUNS)
def test_training(launched, inputs, command, name):
    found = launched[f"{command} {name}"]
    assert [rank["kind"] for rank in found["ranks"]] == ["DEEPSPEED"] * 2
    for rank in found["ranks"]:
        assert rank["processes"] == 2
        assert rank["sharded"] == (rank["parameters"] if name.startswith("zero3") else 0)
    assert "note:" not in found["output"]
    log, expected = (log_of(inputs.folder / f"{command} {kind}") for kind in (name, "ddp"))
    assert [entry["step"] for entry in log] == [1, 2]
    for ours, theirs in zip(log, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert (inputs.folder / f"{command} {name}" / "out" / "model.safetensors").stat().st_size > 10_000


@pytest.mark.parametrize("command", ["features find", "sae train"])
def test_commands_that_train_no_model(launched, inputs, command):
    assert [rank["status"] for rank in launched[command]["ranks"]] == [0, 0]
    assert (inputs.folder / command / "summary.json").exists()
