"""The benchmarks of the operators run, on the CPU and in small, and write what docs/results is made from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = {
    "decode": ["--tokens", "16", "--d-model", "32", "--d-sae", "256", "--k", "4", "--rounds", "2", "--no-memory"],
    "gpu_kernels": ["--device", "cpu", "--tiny"],
    "gpu_models": ["--device", "cpu", "--tiny"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_runs_and_reports(name, tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *CASES[name], "--output", str(output)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["benchmark"] == name
    assert report["versions"]
    assert report["table"]["rows"]
    if name == "decode":
        assert {"forward sparse_decode", "training sparse_decode", "training dense"} <= set(report["results"])
    elif name == "gpu_kernels":
        assert set(report["results"]["tiny"]) >= {"encode", "decode", "penalty", "steering"}
    else:
        assert report["results"]["tiny"]["sasft"]["2 features x 2 layers"]["share_of_a_step"] > 0
        assert report["results"]["tiny"]["decoding"]["steered"]["ratio"] > 0


def test_the_gpu_script_is_valid_bash():
    done = subprocess.run(
        ["bash", "-n", str(ROOT / "benchmarks" / "gpu.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
