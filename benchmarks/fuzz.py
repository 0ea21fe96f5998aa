"""Random search through everything that reads files, in rounds until the time is over, with the count of inputs tried.

    python benchmarks/fuzz.py [--seconds 600] [--examples 1000] [--seed N] [--output benchmarks/results/fuzz.json]

A round runs the tests of FILES, `--examples` inputs each, with a seed of its own, by which it can be repeated:
`--seed N --seconds 1`. The search ends at the first failure; what it finds becomes an @example of its test.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.interleaved import write_report

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "attacks/test_fuzzed_headers.py",
    "attacks/test_fuzzed_files.py",
    "attacks/test_fuzzed_checkpoints.py",
    "test_jsonl.py",
)
READERS = {
    "fuzzed_headers": "SAE containers (safetensors, npz, pt, settings)",
    "documents_of_feature_sets": "FeatureSet",
    "feature_sets_with": "FeatureSet",
    "recipe.yaml": "recipes (YAML)",
    "jsonl": "JSONL (texts, prompts, items, explanations)",
    "txt": "text files",
    "csv": "tables (CSV, TSV)",
    "tsv": "tables (CSV, TSV)",
    "sums_of": "checkpoints: sums of a feature pass",
    "sae_training": "checkpoints: SAE training",
    "state_of": "checkpoints: state of a trainer",
    "answers_of": "checkpoints: answers of an endpoint",
}
"""A part of a test's name -> what it reads; the first that fits"""
_COUNTS = re.compile(r"(\d+) passing\b[^,]*, (\d+) failing")


class Counting:
    """A plugin of pytest: runs the random tests alone, in an order drawn by the seed, until the time is over, and adds
    up the inputs that Hypothesis tried by reader."""

    def __init__(self, end: float) -> None:
        self.end = end
        self.seed = 0
        self.failed = False
        self.tried: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if getattr(item.obj, "is_hypothesis_test", False)]
        random.Random(self.seed).shuffle(items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed

    def pytest_runtest_teardown(self, item: Any) -> None:
        reader = next((reader for part, reader in READERS.items() if part in item.nodeid), item.nodeid)
        counts = _COUNTS.findall(getattr(item, "hypothesis_statistics", ""))
        if not counts and not self.failed:
            raise RuntimeError(f"Hypothesis tells no counts of {item.nodeid}: its words have changed.")
        self.tried[reader] += sum(int(passing) + int(failing) for passing, failing in counts)
        if time.monotonic() > self.end:
            item.session.shouldstop = "the time is over"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz.json")
    options = parser.parse_args(arguments)
    os.environ["FUZZ_EXAMPLES"] = str(options.examples)  # read by tests/conftest.py
    started = time.monotonic()
    counting, seeds = Counting(started + options.seconds), []
    while not counting.failed and (not seeds or time.monotonic() < counting.end):
        counting.seed = options.seed + len(seeds)
        seeds.append(counting.seed)
        print(f"Seed {counting.seed}", flush=True)
        words = [
            "-q",
            "-x",
            "--hypothesis-profile=fuzz",
            f"--hypothesis-seed={counting.seed}",
            "-p",
            "no:cacheprovider",
        ]
        pytest.main([*words, *(str(ROOT / "tests" / file) for file in FILES)], plugins=[counting])
    rows = [[reader, tried] for reader, tried in sorted(counting.tried.items())] + [["all", counting.tried.total()]]
    seconds = round(time.monotonic() - started)
    title = f"{len(seeds)} rounds in {seconds} s, {'a failure' if counting.failed else 'no failure'}"
    table = {"title": title, "columns": ["reader", "inputs tried"], "rows": rows}
    for reader, tried in rows:
        print(f"{tried:>10,}  {reader}")
    write_report(options, "fuzz", seeds=seeds, seconds=seconds, failed=counting.failed, table=table)
    return int(counting.failed)


if __name__ == "__main__":
    sys.exit(main())
