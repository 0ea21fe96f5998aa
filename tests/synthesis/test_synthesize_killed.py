"""SIGKILL in the middle of `qscope synthesize`, and the same command again: nothing answered is asked for again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from endpoint_server import serving
from word_world import grammar

from qscope_posttrain.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.promise("Synthesis, killed and resumed, gives the data of an unbroken run and asks for nothing again")
@pytest.mark.slow
def test_killed_and_resumed_is_as_unbroken_and_asks_for_nothing_again(whole, rows_of, arguments, tmp_path):
    with serving(grammar, delay=0.02) as server:
        command = [sys.executable, "-m", "qscope_posttrain", *arguments(server, tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            while len(server.answered) < 60:
                assert process.poll() is None
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "data").exists()
        answers = tmp_path / "answers.jsonl"
        answers.write_bytes(answers.read_bytes() + b'{"key": "cut in the mid')  # as if killed while writing
        recorded = {_identity(json.loads(line)["request"]) for line in answers.read_text().split("\n")[:-1]}
        assert len(recorded) >= 58  # two at a time: what had been answered is there, but for those under way
        before = len(server.requests)
        server.delay = 0.0
        assert main(arguments(server, tmp_path)) == 0
        again = {_identity(body) for body in server.requests[before:]}
        assert not again & recorded
        assert len(again) == len(server.requests) - before == len(whole[1].requests) - len(recorded)
    assert rows_of(tmp_path, ids=False) == rows_of(whole[0], ids=False)


def _identity(request):
    sample = request["seed"] if "seed" in request else request["sample"]
    return json.dumps([request["messages"], sample], sort_keys=True)
