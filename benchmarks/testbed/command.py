"""`qscope demo`: both training signals on tiny models, from training data to a summary table and a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.settings import TaskSettings
from benchmarks.testbed.switching.config import SwitchingConfig
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.errors import UserValueError

QUICK: dict[str, Any] = {
    "corpus_scale": 0.5,
    "pretraining_steps": 400,
    "sae_steps": 100,
    "sae_windows": 600,
    "feature_windows": 150,
    "sft_windows": 320,
    "sampled_prompts": 240,
    "evaluation_windows": 100,
    "seeds": [101],
    "arms": ["sasft_combined", "token_penalty", "random_features"],
}
QUICK_REPETITION: dict[str, Any] = {
    "habit_steps": 700,
    "rare_steps": 150,
    "rare_loops": 0.03,
    "loop_samples": 6000,
    "sae_steps": 200,
    "sae_documents": 1500,
    "strengths": [1.0],
    "weak_strengths": [0.75],
    "scan_samples": 32,
    "scan_fresh_samples": 96,
    "updates": 30,
    "sampled_problems": 4000,
    "benign_problems": 200,
    "seeds": [0],
    "arms": ["plain", "default", "seeded", "random"],
}
"""The small run: sizes at which the effects are clear, in less than five minutes on two idle cores. One seed each."""
PREFIX = "repetition_"
SHARED = tuple(field.name for field in dataclasses.fields(TaskSettings) if field.name != "device")
"""Settings that both tasks take from the same option."""


@dataclass
class DemoArguments:
    """Parts to run, and where the results go. Every setting of both tasks is an option beside these, those of the
    repetition task with the prefix `repetition_`."""

    output: str = field(default="runs/demo", metadata={"help": "Folder for report.html, summary.json and the rest."})
    part: Literal["both", "switching", "repetition"] = field(
        default="both",
        metadata={"help": "SASFT against language switching, DAPO with negatives against endless repetition, or both."},
    )
    full: bool = field(
        default=False,
        metadata={"help": "Larger models, more methods and seeds: some 20 minutes on two cores instead of about five."},
    )
    quick: bool = field(default=False, metadata={"help": "The small run, which is the default."})


def run(arguments: Sequence[str]) -> int:
    """Parse (`--config FILE` works here too), run, and return the exit status."""
    kinds = (DemoArguments, SwitchingConfig, repetition_arguments())
    parser = CommandParser(kinds, prog="qscope demo")
    demo, config, second = parser.build(arguments)
    if demo.full and demo.quick:
        raise UserValueError("--full and --quick exclude each other; give one of them, or neither for the small run.")
    if not demo.full:
        quick = QUICK | {PREFIX + name: value for name, value in QUICK_REPETITION.items()}
        demo, config, second = parser.build(arguments, quick)
    given = {name.removeprefix(PREFIX): value for name, value in vars(second).items()}
    shared = {name: getattr(config, name) for name in SHARED}
    repetition = RepetitionConfig(**shared, **given)
    from benchmarks.testbed.demo import run_demo

    run_demo(
        None if demo.part == "repetition" else config, demo.output, None if demo.part == "switching" else repetition
    )
    return 0


def repetition_arguments() -> type:
    """Make a dataclass of the fields of RepetitionConfig that are not shared, with the prefix `repetition_`."""
    hints = get_type_hints(RepetitionConfig)
    made: list[tuple[str, Any, Any]] = []
    for entry in dataclasses.fields(RepetitionConfig):
        default: dict[str, Any] = {"default": entry.default}
        if entry.default is dataclasses.MISSING:
            default = {"default_factory": entry.default_factory}
        if entry.name not in SHARED:
            made.append((PREFIX + entry.name, hints[entry.name], field(metadata=entry.metadata, **default)))
    return dataclasses.make_dataclass("RepetitionArguments", made)
