"""Every launch file of configs/ that needs no DeepSpeed starts every command, with nothing but --num_processes changed.

Of ZeRO see `test_deepspeed.py`, of the numbers `test_equality.py`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from distributed.launches import Inputs, job, log_of, run_jobs
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STATIC = ("--rdzv_backend", "static")
FILES = {
    "cpu": ("cpu.yaml", (), 1),
    "ddp": ("ddp.yaml", (), 1),
    "fsdp2": ("fsdp2.yaml", (), 1),
    "two machines, c10d": ("multi_node_fsdp2.yaml", (), 2),
    "two machines, static": ("multi_node_fsdp2.yaml", STATIC, 2),
}
COMMANDS = ("sft", "grpo", "sae train", "features find")
RUNS = list(itertools.product(COMMANDS, FILES))
TRAINED = [(command, name) for command, name in RUNS if command in ("sft", "grpo")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("launches"))


@pytest.fixture(scope="module")
def launched(inputs):
    jobs = {}
    for command, name in RUNS:
        config, flags, machines = FILES[name]
        arguments = inputs.arguments(command, f"{command} {name}", 2)
        jobs[f"{command} {name}"] = job(config, arguments, *flags, machines=machines)
    for command in COMMANDS[2:]:
        jobs[f"{command} alone"] = job(None, inputs.arguments(command, f"{command} alone", 1))
    jobs["unsharded"] = job("fsdp2.yaml", inputs.arguments("sft", "unsharded", 2), shard=False)
    jobs["bf16"] = job("fsdp2.yaml", inputs.arguments("sft", "bf16", 2, bf16=True))
    return run_jobs(inputs.folder, jobs)


@pytest.mark.promise("Every launch file starts `qscope sft` and `qscope grpo`; under FSDP2 all parameters are sharded.")
@pytest.mark.parametrize(("command", "name"), TRAINED)
def test_training(launched, inputs, command, name):
    found = launched[f"{command} {name}"]
    assert len(found["ranks"]) == 2
    for rank in found["ranks"]:
        assert rank["processes"] == 2
        assert rank["precision"] == "no", "the recipe asks for none"
        assert rank["parameters"] > 20
        assert rank["sharded"] == (rank["parameters"] if FILES[name][0].endswith("fsdp2.yaml") else 0)
    assert found["output"].count("configuration written") == 1  # rank 0 alone
    log, expected = log_of(inputs.folder / f"{command} {name}"), log_of(inputs.folder / f"{command} cpu")
    assert [entry["step"] for entry in log] == [1, 2]
    for ours, theirs in zip(log, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-6)
        if command == "grpo":
            assert ours["negative/rows"] == 4
            assert ours["negative/gradient_share"] > 0
            assert found["output"].count("Ordinary rows and negatives") == 1
        else:
            assert ours["sasft/hook_calls"] == 1


@pytest.mark.promise("`features find` under every launch file finds what one process finds.")
@pytest.mark.parametrize("name", FILES)
def test_finding(launched, inputs, name):
    found, alone = (
        load_file(inputs.folder / f"features find {kind}" / "features.safetensors") for kind in (name, "alone")
    )
    assert found.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.allclose(found[key].double(), value.double(), rtol=1e-5, atol=1e-7, equal_nan=True), key


@pytest.mark.promise("`sae train` under every launch file trains the SAE of one process, up to the order of summation.")
@pytest.mark.parametrize("name", FILES)
def test_sae_training(launched, inputs, name):
    one, two = (
        {path.name: load_file(path) for path in (inputs.folder / f"sae train {kind}").rglob("*.safetensors")}
        for kind in ("alone", name)
    )
    assert one
    assert one.keys() == two.keys()
    for file, tensors in one.items():
        for key, value in tensors.items():
            difference = torch.linalg.vector_norm(two[file][key] - value)
            assert difference <= 1e-3 * torch.linalg.vector_norm(value), (file, key)


@pytest.mark.promise("Two machines meet at the address and port of the command line.")
@pytest.mark.parametrize("name", [name for name in FILES if FILES[name][2] == 2])
def test_machines_meet_where_the_command_line_says(launched, name):
    first, second = launched[f"sft {name}"]["endpoints"]
    assert first == second
    assert first.startswith("127.0.0.1:")
    assert not first.endswith(":0")


@pytest.mark.promise("The recipe's bf16 decides under every launch file.")
def test_the_recipe_decides_on_the_precision(launched):
    assert {rank["precision"] for rank in launched["bf16"]["ranks"]} == {"bf16"}


@pytest.mark.promise("fp16 on a CPU, which is fp32, is said, and so is a launch file that shards nothing there.")
def test_a_launch_that_shards_nothing_is_said(launched):
    assert [rank["sharded"] for rank in launched["unsharded"]["ranks"]] == [0, 0]
    assert launched["unsharded"]["output"].count("note: the launch file asks for FSDP") == 1
    assert "note:" not in launched["sft fsdp2"]["output"]
