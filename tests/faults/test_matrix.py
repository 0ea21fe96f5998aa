"""A part of `make faults`: commands that are killed or stopped, and go on as if they had not been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # a process that imports everything, and a dozen commands
@pytest.mark.promise(
    "A run that is killed or stopped goes on with the same command, and ends bit for bit as an unbroken one"
)
def test_a_part_of_the_matrix(tmp_path):
    command = [sys.executable, "-m", "benchmarks.faults", "--processes", "1", "--folder", str(tmp_path / "runs")]
    command += ["--jobs", "sae train", "evaluate repetition", "--faults", "SIGTERM", "kill"]
    command += ["--draws", "1", "--output", str(tmp_path / "faults.json")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((tmp_path / "faults.json").read_text())["cells"]
    assert len(cells) == 4
    for cell in cells:
        assert cell["resumed"] == "none, bit for bit", cell
        assert cell["damaged files"] == [], cell
        assert not cell["traceback"], cell
        assert cell["status"] == {"SIGTERM": 143, "kill": 137}[cell["fault"]], cell
