"""A rank that dies or hangs while the others wait for it: they end, and say which."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # processes that import torch and accelerate

HERE = Path(__file__).resolve().parent


@pytest.mark.promise("A rank that dies silently or hangs ends the job within its timeout, and the others name it")
@pytest.mark.parametrize(
    ("fate", "words"), [("dies", "rank 1 has ended"), ("hangs", "rank 1 did not answer in time: it hangs")]
)
def test_the_other_rank_ends_and_names_it(fate, words):
    command = [sys.executable, str(HERE / "absent_rank.py"), fate]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 1, done.stderr
    assert len(said) == 1, done.stderr
    assert words in said[0]
