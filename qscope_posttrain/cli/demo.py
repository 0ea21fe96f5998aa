"""`qscope demo`: the whole chain on a tiny model, from text to a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qscope_posttrain.cli.parser import RecipeParser
from qscope_posttrain.testbed.config import TestbedConfig


@dataclass
class DemoArguments:
    """Where the results go; every setting of the testbed is an option beside it."""

    output: str = field(default="runs/demo", metadata={"help": "Folder for report.html, summary.json and the rest."})


def run(arguments: Sequence[str]) -> int:
    """Parse (`--config FILE` works here too), run, and return the exit status."""
    demo, config = RecipeParser((DemoArguments, TestbedConfig), prog="qscope demo").parse(arguments)
    from qscope_posttrain.testbed.demo import run_demo

    run_demo(config, demo.output)
    return 0
