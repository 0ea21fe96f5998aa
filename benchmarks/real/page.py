"""Tables of docs/ that are made from all results on real models together."""

from __future__ import annotations

import json
from pathlib import Path

from qscope_posttrain.report.tables import Table


def costs(folder: Path) -> str:
    """Processor time and peak memory of each step that `make real` ran."""
    rows: list[list[str | int | None]] = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        model, _, step = path.stem.partition("_")
        seconds = found.get("processor_seconds")
        minutes = None if seconds is None else max(1, round(seconds / 60))
        rows.append([model, step.replace("_", " "), minutes, found.get("peak_mib"), found["commit"]])
    caption = "Threads: 1. A dash: not measured. Commit: that of the code which ran."
    columns = ["model", "step", "processor time, minutes", "peak memory, MiB", "commit"]
    return Table("Time and memory", columns, rows, caption).to_markdown()
