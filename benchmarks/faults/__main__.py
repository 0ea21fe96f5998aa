"""The fault matrix: each job of the package meets each fault, on tiny models, and goes on with the same command.

    python -m benchmarks.faults                                   # everything (`make faults`); what is done is kept
    python -m benchmarks.faults --jobs sft --faults kill SIGTERM --processes 1

Every command runs in a process of its own, into which the fault is brought from outside (`launcher.py`). A cell of the
table says what was lost: files that cannot be read, and work that is done twice when the same command goes on, as a
share of an unbroken run's; whether the result then equals that of an unbroken run; the last line that a user reads;
the exit status; and the seconds from the fault to the end of the command. Points at which a fault comes are drawn with
a seed. A command has 5 minutes, which only a hang reaches; the whole takes at most an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from benchmarks.faults import jobs, processes
from benchmarks.interleaved import commit
from qscope_posttrain.provenance import machine, package_versions
from qscope_posttrain.report.tables import Table
from tests.endpoint_server import Server, serving

RESULTS = processes.ROOT / "benchmarks" / "results" / "faults.json"
TRAINING = ("sft", "grpo")
ASKING = ("features explain", "synthesize")
TOGETHER = ("sft", "grpo", "sae train", "features find")
LIMIT = 300.0


@dataclass(frozen=True)
class Cell:
    """One fault in one job."""

    job: str
    fault: str
    processes: int = 1
    draw: int = 0
    """Number of the draw of a point; the others are drawn at other places"""
    agent: bool = False  # Whether the processes are started, and watched, by `accelerate launch`

    @property
    def key(self) -> str:
        return f"{self.job}/{self.fault}/{self.processes}/{self.draw}" + ("/agent" if self.agent else "")

    @property
    def timeout(self) -> int | None:
        """Seconds that processes wait for one another, where one does not answer."""
        return 45 if self.fault in ("freeze", "sleep") else None


def cells() -> list[Cell]:
    """The whole matrix."""
    found = [Cell(job, "kill", draw=draw) for job in jobs.JOBS for draw in range(3)]
    for fault in ("SIGTERM", "Ctrl-C", "disk full", "read-only from the start"):
        found += [Cell(job, fault) for job in jobs.JOBS]
    found += [Cell(job, "read-only") for job in TOGETHER]  # the others hold a file open, so that no disk can become so
    found += [Cell(job, "NaN") for job in ("sft", "grpo", "sae train", "features find", "evaluate repetition")]
    found += [Cell(job, "worker") for job in TRAINING]
    found += [Cell(job, fault) for job in ASKING for fault in ("endpoint down", "endpoint down for an hour")]
    together = ("kill", "raise", "SIGTERM", "Ctrl-C to all", "sleep")
    found += [Cell(job, fault, 2) for fault in together for job in TOGETHER]
    found += [Cell("sft", "freeze", 2)]
    watched = ("kill", "raise", "SIGTERM to the launcher", "sleep")
    return found + [Cell("sft", fault, 2, agent=True) for fault in watched]


class Bench:
    """Runs cells in one folder, and keeps what an unbroken run gave."""

    def __init__(self, folder: Path, server: Server, seed: int) -> None:
        self.folder, self.server, self.seed = folder, server, seed
        self.world = jobs.World(folder / "world")
        self._whole: dict[tuple[str, int], tuple[processes.Ended, dict[str, Any], int]] = {}

    def whole(self, job: jobs.Job, count: int, more: list[str]) -> tuple[processes.Ended, dict[str, Any], int]:
        """(how it ended, results, bytes of the output folder) of an unbroken run."""
        if (job.name, count) not in self._whole:
            output = self.folder / f"whole-{_name(job.name)}-{count}"
            ended = self._run(job, output, {}, count, more)
            if ended.status:
                raise RuntimeError(f"{job.name} fails without a fault:\n{ended.said[-2000:]}")
            size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
            self._whole[job.name, count] = ended, jobs.results(job, output), size
        return self._whole[job.name, count]

    def cell(self, cell: Cell) -> dict[str, Any]:
        """Run one cell: the fault, then the same command again."""
        job, more = jobs.JOBS[cell.job], _more(cell)
        unbroken, results, size = self.whole(job, cell.processes, more if cell.fault == "worker" else [])
        draw = random.Random(f"{self.seed} {cell.key}")
        of = "points" if cell.processes == 1 else "work"  # only the first rank writes files
        points = unbroken.points if cell.processes == 1 else unbroken.work
        late = points * (5 if cell.fault == "NaN" else 9) // 10
        at = draw.randint(max(2, points // 10), max(2, late))
        fault: dict[str, Any] = {"kind": cell.fault, "at": at, "of": of, "rank": cell.processes - 1}
        output = self.folder / _name(cell.key)
        down: list[tuple[str, Any]] = []
        with _disk(cell, output, size, draw) as disk:
            if cell.fault in ("disk full", "read-only from the start"):
                fault["kind"] = None
            elif cell.fault.startswith("endpoint"):
                at = draw.randint(3, max(4, len(self._asked(job)) // 2))
                hour = cell.fault.endswith("hour")
                fault |= {"kind": "slow clock", "argument": 0.001 if hour else 0.1}
                down = [("ok", None)] * at + [("status", (503, {}))] * (170 if hour else 10**4)
            elif cell.fault == "worker":
                fault["at"] = 4
            self.server.faults[:] = down
            ended = self._run(job, output, fault, cell.processes, more, cell)
            self.server.faults.clear()
            broken = jobs.damaged(output)
            kept = [path.name for path in output.glob("checkpoint-*")] if output.is_dir() else []
            disk()
            again = self._run(job, output, {}, cell.processes, _more(cell, again=True))
            equal = jobs.difference(results, jobs.results(job, output)) if again.status == 0 else "the rerun fails"
            broken += jobs.damaged(output)
        comparable = ended.status != 0 and cell.processes == 1 and not cell.fault.startswith("endpoint")
        twice = max(0.0, (ended.work + again.work - unbroken.work) / unbroken.work)
        return {
            **asdict(cell),
            "point": f"{at} of {points}",
            "damaged files": broken,
            "checkpoints": kept,
            "work done twice": round(twice, 3) if comparable else None,
            "resumed": equal if again.status == 0 else f"fails: {_last(again.said)}",
            "message": _message(ended.said),
            "traceback": "Traceback" in ended.said,
            "status": "hangs" if ended.hung else ended.status,
            "seconds": round(ended.seconds, 1),
            "said": ended.said[-3000:],
        }

    def _asked(self, job: jobs.Job) -> list[str]:
        path = self.folder / f"whole-{_name(job.name)}-1" / "answers.jsonl"
        return path.read_text(encoding="utf-8").splitlines()

    def _run(
        self,
        job: jobs.Job,
        output: Path,
        fault: dict[str, Any],
        count: int,
        more: list[str],
        cell: Cell | None = None,
    ) -> processes.Ended:
        line = [*job.line(self.world, output, self.server.url), *more]
        fault = {**fault, "output": str(output)}
        how: dict[str, Any] = {} if cell is None else {"agent": cell.agent, "timeout": cell.timeout}
        scratch = self.folder / "scratch" / output.name
        return processes.run(line, fault, scratch, processes=count, limit=LIMIT, **how)


def _more(cell: Cell, again: bool = False) -> list[str]:
    """Options that a fault needs: workers to die, and a timeout that is shorter than half an hour."""
    if cell.fault == "worker":
        return ["--dataloader_num_workers=1"]
    if cell.fault.endswith("hour") and not again:
        return ["--attempts", "1000"]
    if cell.timeout is not None and cell.job in TRAINING and not again:
        return [f"--ddp_timeout={cell.timeout}"]
    return []


@contextmanager
def _disk(cell: Cell, output: Path, size: int, draw: random.Random) -> Iterator[Any]:
    """A disk of its own for the output where the fault is one of disks; gives a function that mends it."""
    if cell.fault not in ("disk full", "read-only", "read-only from the start"):
        yield lambda: None
        return
    output.mkdir(parents=True)
    room = f"size={int(size * draw.uniform(0.2, 0.8)) // 4096 * 4}k" if cell.fault == "disk full" else "size=1g"
    access = "ro" if cell.fault.endswith("start") else "rw"
    _mount("-t", "tmpfs", "-o", f"{access},{room}", "tmpfs", str(output))
    try:
        yield lambda: _mount("-o", "remount,rw,size=1g", str(output))
    finally:
        subprocess.run(["umount", "-l", str(output)], check=True)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"a disk of its own needs root: {done.stderr.strip()}")


def _name(key: str) -> str:
    return re.sub(r"\W+", "-", key)


def _last(said: str) -> str:
    """The last line that a person reads."""
    lines = [line.strip() for line in re.split(r"[\r\n]", said) if line.strip()]
    lines = [line for line in lines if not re.search(r"it/s\]|s/it\]|Warning:|warnings\.warn", line)]
    return lines[-1] if lines else ""


def _message(said: str) -> str:
    """The lines in which a command says why it ended, or else its last line."""
    lines = [line.strip() for line in said.splitlines()]
    ends = [n for n, line in enumerate(lines) if re.match(r"error( \(rank \d+\))?: |interrupted|stopped by", line)]
    beside = [*lines[ends[-1] + 1 :], *lines[max(0, ends[-1] - 1) : ends[-1]]] if ends else []
    kept = [line for line in beside if " kept " in line or "checkpoint" in line]
    if ends:
        return "; ".join([lines[ends[-1]].rstrip("."), *kept[:1]])
    told = [found.group(0) for line in lines if (found := re.search(r"failed \(exitcode.*?local_rank: \d+", line))]
    return f"{told[0]} (the launcher)" if told else _last(said)


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """The matrix as a table, one row for all draws of a fault: the worst of each value, and the message of the last."""
    columns = ["job", "fault", "damaged files", "work done twice, %", "resumed against unbroken", "status", "seconds"]
    together: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        fault = row["fault"] + (", accelerate launch" if row.get("agent") else "")
        together.setdefault((row["job"], fault), []).append(row)
    cells: list[list[Any]] = []
    for (job, fault), draws in together.items():
        done = [row for row in draws if "not run" not in row]
        if not done:
            cells.append([job, fault, *["-"] * 5, f"not run: {draws[0]['not run']}"])
            continue
        damaged = sorted({name for row in done for name in row["damaged files"]})
        twice = [row["work done twice"] for row in done if row["work done twice"] is not None]
        resumed = sorted({row["resumed"] for row in done})
        last = re.sub(r"\S*/run-\d+/", "", done[-1]["message"])
        cells.append([
            job, fault, ", ".join(damaged) or "none", f"{100 * max(twice):.0f}" if twice else "-", "; ".join(resumed),
            " ".join(sorted({str(row["status"]) for row in done})), max(row["seconds"] for row in done), last[:300],
        ])  # fmt: skip
    return Table(title, [*columns, "last words"], cells)


def main() -> None:
    """Run the cells that are asked for and not done yet, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(jobs.JOBS), default=list(jobs.JOBS))
    parser.add_argument("--faults", nargs="+", help="names of faults; by default all")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--draws", type=int, default=3, help="places at which a command is killed")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="for the runs; what is done is kept")
    parser.add_argument("--seed", type=int, default=0, help="of the points at which faults come")
    parser.add_argument("--again", action="store_true", help="run what is done once more")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON of the table")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # behind `&` it is ignored, and in all children too
    wanted = [
        cell
        for cell in cells()
        if cell.job in options.jobs
        and cell.processes in options.processes
        and cell.draw < options.draws
        and (options.faults is None or cell.fault in options.faults)
    ]
    done_path = options.folder.resolve() / "cells.json"
    done = json.loads(done_path.read_text()) if done_path.is_file() else {}
    missing = [cell for cell in wanted if options.again or cell.key not in done]
    print(f"{len(missing)} cells to run, about {len(missing) * 20 // 60 + 1} minutes; {len(done)} are done", flush=True)
    if missing:
        run_cells(missing, done, done_path, options.seed)
    rows = [done[cell.key] for cell in cells() if cell.key in done]
    table([done[cell.key] for cell in wanted], "Faults").print()
    write_results(rows, options.seed, options.output)


def write_results(rows: list[dict[str, Any]], seed: int, output: Path) -> None:
    """Write both tables and all cells as JSON."""
    tables = {
        "one": table([row for row in rows if row["processes"] == 1], "Faults in one process"),
        "two": table([row for row in rows if row["processes"] > 1], "Faults in two processes"),
    }
    kept = [{key: value for key, value in row.items() if key != "said"} for row in rows]
    content = {"tables": {name: one.to_dict() for name, one in tables.items()}, "seed": seed}
    content |= {"commit": commit(), "versions": package_versions(), "machine": machine()}
    content["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in kept)  # one cell a line, for the diff's sake
    text = json.dumps(content, indent=1, ensure_ascii=False)[:-2] + f',\n "cells": [\n{lines}\n ]\n}}\n'
    output.write_text(text, encoding="utf-8")


def run_cells(missing: list[Cell], done: dict[str, Any], done_path: Path, seed: int) -> None:
    """Run cells, and keep each as soon as it is done."""
    processes.prepare()
    folder = done_path.parent / f"run-{os.getpid()}"
    folder.mkdir(parents=True)
    if (child := os.fork()) == 0:  # the process that forks the others computes nothing itself
        with contextlib.suppress(BaseException):
            jobs.write_world(folder / "world")
            os._exit(0)
        os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the inputs of the jobs could not be made")
    with serving(jobs.answer) as server:
        bench = Bench(folder, server, seed)
        for cell in missing:
            try:
                row = bench.cell(cell)
            except PermissionError as error:
                row = {**asdict(cell), "not run": str(error)}
            done[cell.key] = row
            done_path.write_text(json.dumps(done, indent=1), encoding="utf-8")
            words = {name: row.get(name) for name in ("status", "seconds", "work done twice", "resumed", "message")}
            print(f"{cell.key}: {json.dumps(words)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
