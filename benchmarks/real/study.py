"""One study of one model as a program, with a process of its own: `python -m benchmarks.real.study NAME`.

`benchmarks.real.studies.NAME` has `run(options)`, which returns the numbers of the study: `tables`, {name: Table as a
dictionary}, from which the page is made, and what else is worth keeping.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qscope_posttrain.report.summary import to_json, write_text


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    result = importlib.import_module(f"benchmarks.real.studies.{options.study}").run(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.output, json.dumps(to_json(result), indent=1, ensure_ascii=False) + "\n")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="name of a module of studies/")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--saes", type=Path, help="folder of its SAEs")
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="layers that have an SAE")
    parser.add_argument("--work", type=Path, required=True, help="folder of the study's own files, kept between runs")
    parser.add_argument("--quick", action="store_true", help="fewer texts, to see that it runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the numbers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
