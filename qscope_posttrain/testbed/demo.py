"""The main command: both methods on tiny models, from training data to a report."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.provenance import machine, package_versions
from qscope_posttrain.report.html import write_html
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.repetition_part import run_repetition
from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.demo_part import DemoPart
from qscope_posttrain.testbed.switching_part import run_switching

REPORT = "report.html"
REPETITION_FOLDER = "arithmetic"


def run_demo(switching: TestbedConfig | None, output: str | Path, repetition: ArithmeticConfig | None = None) -> Path:
    """Run one half of the demo or both, print the tables, and write everything into `output`.

    Written: `report.html`, `summary.json`, and what the other commands read: of the first half beside them (see
    `testbed.export`, with `examples.jsonl`), of the second in `arithmetic/` (see `testbed.arithmetic.export`).

    Args:
        switching: SASFT on a model that switches languages; None leaves it out.
        output: folder.
        repetition: DAPO with steered negatives on a model that seldom repeats itself; None leaves it out.

    Returns:
        The path of the report.

    Raises:
        ValueError: neither half, a folder that cannot be written, or settings that cannot work.
        FileNotFoundError: a corpus that is not there.
    """
    if switching is None and repetition is None:
        raise UserValueError("Nothing to run: give the settings of at least one half of the demo.")
    require_extra("report")
    folder = writable_folder(output)
    started = time.monotonic()
    parts: list[DemoPart] = []
    settings: dict[str, Any] = {}
    if switching is not None:
        parts.append(run_switching(switching, folder))
        settings |= asdict(switching)
    if repetition is not None:
        parts.append(run_repetition(repetition, folder / REPETITION_FOLDER))
        settings = {**settings, "repetition": asdict(repetition)} if switching is not None else asdict(repetition)
    status("writing the report")
    seconds = time.monotonic() - started
    report = write_html(
        folder / REPORT,
        "SAE features as training signals, on two tiny worlds",
        [section for part in parts for section in part.sections],
        "A language model that switches languages unasked, and one that seldom repeats itself without end: their "
        "sparse autoencoders, and what training against their features does, next to controls.",
        _facts(parts, seconds),
    )
    results: dict[str, Any] = {"seconds": seconds}
    for part in parts:
        results |= part.results
    results["tables"] = {name: table for part in parts for name, table in part.tables.items()}
    results["artefacts"] = {name: str(place) for part in parts for name, place in part.artefacts.items()}
    results["report"] = report
    write_summary(folder, "demo", settings, results)
    status(f"{seconds:.0f} s; the report is {report}")
    return report


def _facts(parts: list[DemoPart], seconds: float) -> dict[str, str]:
    """Small print: time, seeds, versions, machine."""
    return {
        "time": f"{seconds:.0f} s (artefacts from the cache take none)",
        "seeds": "; ".join(", ".join(map(str, part.seeds)) for part in parts),
        "versions": ", ".join(f"{name} {version}" for name, version in package_versions().items()),
        "machine": ", ".join(f"{name} {value}" for name, value in machine().items()),
    }
