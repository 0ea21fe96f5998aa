"""The main command: both tasks on tiny models, from training data to a summary table and a report."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.repetition.report import run_repetition
from benchmarks.testbed.report import DemoPart, headline_table
from benchmarks.testbed.switching.config import SwitchingConfig
from benchmarks.testbed.switching.report import run_switching
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.provenance import machine, package_versions
from qscope_posttrain.report.html import Section, write_html
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary

REPORT = "report.html"
REPETITION_FOLDER = "arithmetic"


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
    if switching is None and repetition is None:
        raise UserValueError("nothing to run: give the settings of at least one task of the demo")
    require_extra("report")
    folder = writable_folder(output)
    started = time.monotonic()
    parts: list[DemoPart] = []
    settings: dict[str, Any] = {}
    if switching is not None:
        status("part 1: a language model that switches to another language unasked")
        parts.append(run_switching(switching, folder))
        settings |= asdict(switching)
    if repetition is not None:
        status("part 2: a language model that seldom repeats itself without end")
        parts.append(run_repetition(repetition, folder / REPETITION_FOLDER))
        settings = {**settings, "repetition": asdict(repetition)} if switching is not None else asdict(repetition)
    status("writing the report")
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
