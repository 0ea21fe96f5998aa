"""Two gloo processes train the SAEs that one process trains, up to the order of summation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent


# A rounding that moves one pre-activation over its threshold changes a JumpReLU gradient by a whole step, and each
# further update by more: few updates tell an error from that.
@pytest.mark.promise("Two processes train the SAE of one")
@pytest.mark.parametrize(("architecture", "steps"), [("topk", 23), ("batch_topk", 23), ("jumprelu", 6)])
def test_two_processes_equal_one(architecture, steps, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, str(HERE / "sae_worker.py"), str(tmp_path), architecture, str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one, two = (
        torch.load(tmp_path / f"{architecture}-{processes}" / "result.pt", weights_only=False) for processes in (1, 2)
    )
    assert two["facts"]["processes"] == 2
    assert one["facts"]["data"] == two["facts"]["data"]
    for name, value in one["tensors"].items():
        difference = torch.linalg.vector_norm(two["tensors"][name] - value) / torch.linalg.vector_norm(value)
        assert float(difference) < 1e-3, name
    for single, double in zip(one["records"], two["records"], strict=True):
        for layer, means in single.get("layers", {}).items():
            for key in ("fvu", "l0", "dead"):
                assert double["layers"][layer][key] == pytest.approx(means[key], rel=5e-3, abs=1e-6), (layer, key)
