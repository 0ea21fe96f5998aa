"""Run a command with a fault: forked from a process that has imported everything, or by `accelerate launch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults import launcher

ROOT = Path(__file__).resolve().parents[2]
_IMPORTED = (
    "torch", "trl", "openai", "datasets", "qscope_posttrain.cli.training.run", "qscope_posttrain.rl.trainer",
    "qscope_posttrain.sae.training.run", "qscope_posttrain.features.find.contrast", "transformers.models.qwen3",
    "qscope_posttrain.cli.training.sft", "qscope_posttrain.cli.training.grpo_checks",
    "qscope_posttrain.synthesis.report",
    "qscope_posttrain.features.explain.ask", "qscope_posttrain.evaluation.repetition", "trl.trainer.sft_trainer",
    "qscope_posttrain.sft.settings", "trl.trainer.grpo_trainer", "qscope_posttrain.report.html",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    """As a shell shows it: 128 + the number of the signal that ended it"""
    hung: bool  # Ended from here, after the time limit
    seconds: float
    """From the fault to the end, or from the start where there was none"""
    said: str  # Standard error
    points: int
    """Points of progress up to the end, or up to the fault where it did not end by itself"""
    work: int  # Those of them that are forward passes, updates or requests


def prepare() -> None:
    """Import what the commands import, once for all, without computing anything: threads do not survive a fork."""
    import importlib

    for name in _IMPORTED:
        importlib.import_module(name)


def run(
    arguments: list[str], fault: dict[str, Any], scratch: Path, *, processes: int = 1, limit: float = 300.0
) -> Ended:
    """Run `qscope` with these arguments. `fault` is that of `launcher`; `scratch` is a folder for what it says."""
    scratch.mkdir(parents=True, exist_ok=True)
    said, count = scratch / "stderr.txt", scratch / "points.txt"
    count.unlink(missing_ok=True)
    given = {launcher.FAULT: json.dumps({**fault, "count": str(count)})}
    started = time.monotonic()
    with said.open("wb") as errors:
        group = _fork(arguments, given, errors) if processes == 1 else _launch(arguments, given, errors, processes)
        status, hung = _wait(group, started + limit)
    ended, seconds = time.time(), time.monotonic() - started
    if processes > 1:
        _end_rest(str(count))
    counted = (count.read_text() if count.is_file() else "0 0 0").split()
    seconds = ended - float(counted[2]) if float(counted[2]) else seconds
    text = said.read_text(encoding="utf-8", errors="replace")
    return Ended(status, hung, seconds, text, int(counted[0]), int(counted[1]))


def _fork(arguments: list[str], environment: dict[str, str], errors: Any) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        os.dup2(errors.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.environ |= environment
        os.environ.pop("QSCOPE_QUIET", None)
        status = launcher.run(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _launch(arguments: list[str], environment: dict[str, str], errors: Any, processes: int) -> int:
    from tests.free_port import free_port

    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "cpu.yaml")]
    command += [
        "--num_processes",
        str(processes),
        "--main_process_port",
        str(free_port()),
        launcher.__file__,
        *arguments,
    ]
    environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
    )
    return process.pid


def _wait(child: int, until: float) -> tuple[int, bool]:
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return (128 - code if code < 0 else code), False
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 128 + signal.SIGKILL, True


def _end_rest(mark: str) -> int:
    """End what the command has left running, known by its environment; the number of these processes."""
    import psutil

    left = 0
    for process in psutil.process_iter():
        try:
            if mark in process.environ().get(launcher.FAULT, "") and process.pid != os.getpid():
                process.kill()
                left += 1
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return left
