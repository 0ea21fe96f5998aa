"""A quick part of benchmarks/equality.py, with the bounds of the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.equality import BOUND

pytestmark = [
    pytest.mark.slow,
    pytest.mark.promise(
        "Two processes train as one does, with DDP and sharded by FSDP2, in `qscope sft` and `qscope grpo`; resumed "
        "runs equal unbroken ones bit for bit."
    ),
]
ROOT = Path(__file__).resolve().parents[2]
CASES = ("uneven labels, accumulation", "feature, mode paper")
RESUMED = ("seeded",)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("equality") / "equality.json"
    command = [sys.executable, "-m", "benchmarks.equality", "--cases", *CASES, "--resumed", *RESUMED]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", str(output)], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_processes_equal_one(report, number):
    case = report["cases"][number]
    assert case["case"] == CASES[number]
    for way in ("DDP", "FSDP2"):
        found = case[way]
        assert found["processes"] == 2
        assert found["parameters sharded"] == (found["parameters in all"] if way == "FSDP2" else 0)
        for name, bound in BOUND.items():
            assert 0 <= found[name] <= bound, (way, name)


def test_negatives_are_in_the_gradient(report):
    assert report["cases"][1]["share of the gradient that is of negatives"] > 0.01


def test_resumed_runs_equal_unbroken_ones(report):
    (case,) = report["resumed"]
    for way in ("one", "DDP", "FSDP2"):
        assert set(case[way].values()) == {0.0}, way
