"""The launches of a test, from one process that imports everything: `python launch_worker.py FOLDER`.

FOLDER/jobs.json has, by name, the arguments of `benchmarks.launching.launch`; FOLDER/launched.json gets what they left.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.equality import import_trainers
from benchmarks.launching import launch


def main(folder: Path) -> None:
    import_trainers()
    for name in ("features.find.contrast", "cli.features.find", "sae.training.records", "report.html", "report.plots"):
        importlib.import_module(f"qscope_posttrain.{name}")
    for name in ("matplotlib.figure", "matplotlib.backends.backend_svg", "markdown_it"):
        importlib.import_module(name)
    found = {}
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        started = time.monotonic()
        launched = launch(job.pop("config"), job.pop("arguments"), job.pop("flags"), **job)
        found[name] = asdict(launched) | {"seconds": time.monotonic() - started}
    (folder / "launched.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
