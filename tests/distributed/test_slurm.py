"""configs/slurm.sh without Slurm: stand-ins for its commands, of which srun runs what it is given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed.launches import Inputs

from qscope_posttrain.cli.training import interruption

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$STAND_INS/requeued"; fi',
    # As Slurm does, every process of a step gets what scancel sends, the launcher and those that it has started.
    "scancel": """all() { for child in $(ps -o pid= --ppid "$1"); do all "$child"; done; echo "$1"; }
        kill -s "${1#--signal=}" $(all "$(cat "$STAND_INS/step")")""",
    "srun": """while [[ "$1" == --* ]]; do shift; done
        SLURM_NODEID=0 "$@" & echo $! > "$STAND_INS/step"; wait $!""",
}


@pytest.fixture
def batch(tmp_path):
    """Starts configs/slurm.sh as sbatch would, on one machine with two processes."""
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "QSCOPE_QUIET"} | {
        "PATH": f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STAND_INS": str(tmp_path), "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
    }  # fmt: skip

    def start(log: Path, recipe: str, *options: str, **more: str) -> subprocess.Popen:
        command = ["bash", str(ROOT / "configs" / "slurm.sh"), str(ROOT / "configs" / "ddp.yaml"), recipe, *options]
        with log.open("w") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=environment | more)

    return start


def test_the_directives(tmp_path):
    """The lines that Slurm reads: queued again, one log, a signal to the script before the limit."""
    directives = [line for line in (ROOT / "configs" / "slurm.sh").read_text().splitlines() if line[:7] == "#SBATCH"]
    given = {line.split()[1].partition("=")[0]: line.split()[1].partition("=")[2] for line in directives}
    assert {"--requeue", "--open-mode", "--signal", "--nodes", "--time"} <= set(given)
    to, _, seconds = given["--signal"].partition("@")
    assert to == "B:TERM"
    assert int(seconds) > 570, "the launcher's grace has to end before the limit"


@pytest.mark.slow
@pytest.mark.promise("Before its time limit, a job of configs/slurm.sh saves, is queued again, and goes on from there.")
def test_a_job_at_its_limit_goes_on(batch, tmp_path):
    arguments = Inputs(tmp_path / "inputs").arguments("sft", "job", 2, save_strategy="steps", save_steps=100_000)
    recipe, log = arguments[-1], tmp_path / "log"
    job = batch(log, recipe, "--max_steps", "100000")
    while job.poll() is None and "'loss'" not in log.read_text():  # the training is under way
        time.sleep(0.1)
    assert job.poll() is None, log.read_text()[-4000:]
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 143, log.read_text()[-4000:]
    said = log.read_text()
    assert "Dry run" in said
    assert "stopped by SIGTERM after step" in said
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    kept = interruption.last_checkpoint(tmp_path / "inputs" / "job" / "out")
    assert kept is not None, said[-4000:]
    done = json.loads((kept / "trainer_state.json").read_text())["global_step"]
    job = batch(log, recipe, "--max_steps", str(done + 2), SLURM_RESTART_COUNT="1")
    assert job.wait() == 0, log.read_text()[-4000:]
    said = log.read_text()
    assert "Dry run" not in said
    assert f"resuming from {kept}" in said
    assert (
        json.loads((tmp_path / "inputs" / "job" / "out" / "summary.json").read_text())["results"]["steps"] == done + 2
    )
    assert (tmp_path / "requeued").read_text() == "requeue 17\n", "a job that is done is not queued again"


@pytest.mark.promise("A signal that the launcher and Slurm both send counts once; sent again later, it ends at once.")
def test_signals_within_seconds_are_one(monkeypatch):
    now, killed = [100.0], []
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(interruption.os, "kill", lambda process, number: killed.append(number))
    before = signal.getsignal(signal.SIGTERM)
    stop = interruption.StopOnSignal()
    try:
        for later in (0.0, 0.5, interruption.SAME_SIGNAL):
            now[0] = 100.0 + later
            stop.receive(signal.SIGTERM, None)
            assert killed == []
        now[0] += 1
        stop.receive(signal.SIGTERM, None)
        assert killed == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
