"""A launch that starts, shards or computes otherwise than it was asked to is refused, or said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from sft.cases import case_model, make_rows, make_trainer

from qscope_posttrain.cli.main import main
from qscope_posttrain.distributed import check_devices, join_processes, left_out

ROOT = Path(__file__).resolve().parents[2]
ONE_OF_MANY = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
"""What `accelerate launch --cpu --num_processes 2` sets for the one process that it starts"""


@pytest.fixture
def environment(monkeypatch):
    for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "WORLD_SIZE", "PMI_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.promise("`accelerate launch --cpu`, which starts one process of those asked for, is refused.")
class TestOneProcessOfMany:
    def test_it_is_refused(self, environment, capsys):
        environment(**ONE_OF_MANY)
        assert main(["sae", "list"]) == 2
        assert "`accelerate launch --cpu` starts one process" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE"])
    def test_launchers_that_start_all_are_not(self, environment, capsys, name):
        environment(**ONE_OF_MANY, **{name: "2"})
        assert main(["sae", "list"]) == 0

    def test_one_process_on_purpose_is_not(self, environment):
        environment(ACCELERATE_USE_CPU="True")
        assert main(["sae", "list"]) == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["cpu.yaml", "fsdp2.yaml"])
    def test_that_is_what_accelerate_does(self, name):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / name)]
        command += ["--cpu", "--num_processes", "2", "-m", "qscope_posttrain", "sae", "list"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."})
        assert done.returncode != 0
        assert "error: `accelerate launch --cpu` starts one process" in done.stderr


@pytest.mark.parametrize("seconds", ["soon", "1e99", "nan"])
def test_a_timeout_that_is_no_number(environment, seconds):
    environment(WORLD_SIZE="2", QSCOPE_TIMEOUT=seconds)
    with pytest.raises(ValueError, match=f"QSCOPE_TIMEOUT={seconds} is no number of seconds"):
        join_processes("cpu")


def test_a_number_of_processes_without_an_address(environment, monkeypatch):
    environment(WORLD_SIZE="2")
    for name in ("ACCELERATE_USE_CPU", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # accelerate sets some of them
        monkeypatch.delenv(name)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    with pytest.raises(OSError, match=r"2 processes were started and have not come together .*MASTER_ADDR"):
        join_processes("cpu")


@pytest.mark.promise("More processes than GPUs are refused before anything is loaded.")
def test_more_processes_than_gpus(environment, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    environment(LOCAL_WORLD_SIZE="2")
    check_devices()
    environment(LOCAL_WORLD_SIZE="8")
    with pytest.raises(ValueError, match=r"8 processes were started on this machine, and it has 2 GPUs"):
        check_devices()
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)  # a laptop: they run on the CPU
    check_devices()


@pytest.mark.promise("fp16 on a CPU, which is fp32, is said, and so is a launch file that shards nothing there.")
class TestLeftOut:
    @pytest.fixture
    def trainer(self, make_model, tiny_tokenizer):
        return lambda **more: make_trainer(
            case_model(make_model), make_rows(2), processing_class=tiny_tokenizer, **more
        )

    def test_fp16(self, trainer):
        (said,) = left_out(trainer(fp16=True))
        assert said.startswith("fp16 does nothing on a CPU")

    def test_nothing_is_left_out(self, trainer):
        assert left_out(trainer()) == []
        assert left_out(trainer(bf16=True)) == []

    def test_precision_of_a_launch_file(self, trainer, monkeypatch):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        (said,) = left_out(trainer())
        assert "mixed_precision: bf16" in said

    def test_sharding(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        args = SimpleNamespace(fp16=False, bf16=False, mixed_precision="no")
        trainer = SimpleNamespace(args=args, is_fsdp_enabled=False)
        (said,) = left_out(trainer)
        assert said.startswith("the launch file asks for FSDP")
        trainer.is_fsdp_enabled = True
        assert left_out(trainer) == []
