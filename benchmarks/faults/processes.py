"""Run a command with a fault: forked from a process that has imported everything, or by `accelerate launch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
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
    arguments: list[str],
    fault: dict[str, Any],
    scratch: Path,
    *,
    processes: int = 1,
    agent: bool = False,
    timeout: int | None = None,
    limit: float = 300.0,
) -> Ended:
    """Run `qscope` with these arguments.

    Args:
        fault: as for `launcher`.
        scratch: folder for what the command says.
        processes: ranks, started one by one, as `srun` does.
        agent: start them by `accelerate launch`, whose agent watches them, instead.
        timeout: seconds that they wait for one another.
        limit: seconds after which the command hangs.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    said, count = scratch / "stderr.txt", scratch / "points.txt"
    count.unlink(missing_ok=True)
    given = {launcher.FAULT: json.dumps({**fault, "count": str(count)})}
    given |= {} if timeout is None else {"QSCOPE_TIMEOUT": str(timeout)}
    started = time.monotonic()
    with said.open("wb") as errors:
        if agent:
            group = _launch(arguments, given, errors, processes)
        elif processes > 1:
            group = _fork(lambda: _ranks(arguments, given, errors, processes))
        else:
            group = _fork(lambda: _qscope(arguments, given, errors))
        status, hung = _wait(group, started + limit)
    ended, seconds = time.time(), time.monotonic() - started
    if processes > 1:
        _end_rest(str(count))
    counted = (count.read_text() if count.is_file() else "0 0 0").split()
    seconds = ended - float(counted[2]) if float(counted[2]) else seconds
    text = said.read_text(encoding="utf-8", errors="replace")
    return Ended(status, hung, seconds, text, int(counted[0]), int(counted[1]))


def _fork(work: Callable[[], int], session: bool = True) -> int:
    """The process that does `work`, and ends with the status that it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        if session:
            os.setsid()
        status = work()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _qscope(arguments: list[str], environment: dict[str, str], errors: Any) -> int:
    os.dup2(errors.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ |= environment
    os.environ.pop("QSCOPE_QUIET", None)
    return launcher.run(arguments)


def _ranks(arguments: list[str], environment: dict[str, str], errors: Any, processes: int) -> int:
    """Start the ranks, and end what is left of them some seconds after the first rank; the status of that rank, or of
    another where it ended well."""
    from tests.free_port import free_port

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the ranks
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {**environment, "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(processes):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(_fork(lambda own=own: _rank(arguments, own, errors), session=False))
    first, _ = _wait(ranks[0], time.monotonic() + 10**6, group=False)
    others = [_wait(rank, time.monotonic() + 10, group=False)[0] for rank in ranks[1:]]
    return first or max(others)


def _rank(arguments: list[str], environment: dict[str, str], errors: Any) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return _qscope(arguments, environment, errors)


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


def _wait(child: int, until: float, group: bool = True) -> tuple[int, bool]:
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return (128 - code if code < 0 else code), False
        time.sleep(0.02)
    (os.killpg if group else os.kill)(child, signal.SIGKILL)
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
