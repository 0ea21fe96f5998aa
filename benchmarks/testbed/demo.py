"""The main command: both tasks on tiny models, from training data to a summary table and a report.

Each task runs in a process of its own where there are two cores, so this one imports no torch.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from benchmarks.testbed.processes import run_in_parallel, worker_count
from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.report import DemoPart, headline_table
from benchmarks.testbed.switching.config import SwitchingConfig
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.provenance import machine, package_versions
from qscope_posttrain.report.html import Section, write_html
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary

REPORT = "report.html"
REPETITION_FOLDER = "arithmetic"
SWITCHING, REPETITION = "switching", "repetition"


class LabeledLines(io.TextIOBase):
    """Writes whole lines, each after a label, to a stream; no terminal, so progress is written as lines too."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self._stream = stream
        self._label = label
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._stream.write(f"{self._label}: {line}\n")
        self._stream.flush()
        return len(text)


def _run_part(task: tuple[SwitchingConfig | RepetitionConfig, Path, bool]) -> DemoPart:
    """Run one task, in a process of its own (where lines say which of the tasks they are of) or in this one."""
    config, folder, apart = task
    name = SWITCHING if isinstance(config, SwitchingConfig) else REPETITION
    lines = contextlib.redirect_stderr(LabeledLines(sys.stderr, name)) if apart else contextlib.nullcontext()
    with lines:
        status("importing torch and TRL")
        if isinstance(config, SwitchingConfig):
            from benchmarks.testbed.switching.report import run_switching

            return run_switching(config, folder)
        from benchmarks.testbed.repetition.report import run_repetition

        return run_repetition(config, folder / REPETITION_FOLDER)


def run_demo(switching: SwitchingConfig | None, output: str | Path, repetition: RepetitionConfig | None = None) -> Path:
    """Run one task of the demo or both, print the tables, and write everything into `output`.

    Written: `report.html`, `summary.json`, and what the other commands read: of the switching task beside them (see
    `switching.report.export`, with `examples.jsonl`), of the repetition task in `arithmetic/`.

    Args:
        switching: SASFT on a model that switches languages; None leaves it out.
        output: folder.
        repetition: DAPO with negatives on a model that seldom repeats itself without end; None leaves it out.

    Returns:
        The path of the report.

    Raises:
        ValueError: neither task, a folder that cannot be written, or settings that cannot work.
        FileNotFoundError: a corpus that is not there.
    """
    configs = [config for config in (switching, repetition) if config is not None]
    if not configs:
        raise UserValueError("nothing to run: give the settings of at least one task of the demo")
    require_extra("report")
    folder = writable_folder(output)
    started = time.monotonic()
    settings: dict[str, Any] = {} if switching is None else asdict(switching)
    if repetition is not None:
        settings |= asdict(repetition) if switching is None else {"repetition": asdict(repetition)}
    # Most steps of a task are one after the other, so the tasks run side by side, each on its share of the processes.
    processes = worker_count(configs[0].workers)
    tasks = [
        (replace(config, workers=max(1, processes // len(configs))), folder, min(processes, len(configs)) > 1)
        for config in configs
    ]
    found: dict[str, DemoPart] = {}
    for part in run_in_parallel(_run_part, tasks, processes):
        found[part.name] = part
        for table in part.tables.values():
            table.print()
    parts = [found[name] for name in (SWITCHING, REPETITION) if name in found]
    status("writing the report")
    import torch  # noqa: F401 - the record of the machine then says what torch runs on

    seconds = time.monotonic() - started
    headline = headline_table(parts)
    report = write_html(
        folder / REPORT,
        "Two bad habits of tiny language models, and what trains them away",
        [Section("In short", tables=[headline]), *(section for part in parts for section in part.sections)],
        "A language model that switches languages unasked, and one that seldom repeats itself without end: their "
        "sparse autoencoders, and what training against the habit does, next to controls.",
        {
            "time": f"{seconds:.0f} s (artefacts from the cache take none)",
            "seeds": "; ".join(", ".join(map(str, part.seeds)) for part in parts),
            "versions": ", ".join(f"{name} {version}" for name, version in package_versions().items()),
            "machine": ", ".join(f"{name} {value}" for name, value in machine().items()),
        },
    )
    results: dict[str, Any] = {"seconds": seconds}
    for part in parts:
        results |= part.results
    results["tables"] = {"headline": headline} | {name: table for part in parts for name, table in part.tables.items()}
    results["artefacts"] = {name: str(place) for part in parts for name, place in part.artefacts.items()}
    results["report"] = report
    write_summary(folder, "demo", settings, results)
    headline.print()
    status(f"{seconds:.0f} s; the report is {report}")
    return report
