"""Run one step of a study in a process of its own, once: its result, seconds and peak memory stay in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.interleaved import commit
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.provenance import file_sha256, machine, package_versions
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import write_text

ROOT = Path(__file__).resolve().parents[2]


def run_step(name: str, command: Sequence[str], reads: Sequence[Path], work: Path) -> dict[str, Any]:
    """Run `python -m COMMAND` unless it ran before with the same words on the same files; its output goes to
    `work/logs/NAME.log`. Returns what is known about the run. ValueError where it fails, with the end of its log."""
    record, log = work / "steps" / f"{name}.json", work / "logs" / f"{name}.log"
    key = sha256(json.dumps([list(command), [checksum(path) for path in reads]]).encode()).hexdigest()
    if record.is_file() and (known := json.loads(record.read_text()))["key"] == key:
        status(f"{name}: done before")
        return known
    log.parent.mkdir(parents=True, exist_ok=True)
    status(f"{name}: python -m {' '.join(command)}; output in {log}")
    started = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)
        _, wait_status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(wait_status)
    if process.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise UserValueError(f"{name} ended with status {process.returncode}:\n{last}")
    found = {
        "key": key,
        "commit": commit(),
        "command": " ".join(["python", "-m", *command]).replace(str(work), "WORK"),
        "seconds": round(time.monotonic() - started),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "machine": machine(),
        "versions": package_versions(),
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(found, indent=1) + "\n")
    return found


def checksum(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files of a folder, compiled ones aside."""
    inside = (file for file in path.rglob("*") if file.is_file() and file.parent.name != "__pycache__")
    files = sorted(inside) if path.is_dir() else [path]
    return sha256(repr([(str(file.relative_to(path)), file_sha256(file)) for file in files]).encode()).hexdigest()
