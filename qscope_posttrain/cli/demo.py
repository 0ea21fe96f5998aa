"""`qscope demo`: both methods on tiny models, from training data to a report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.errors import UserValueError, did_you_mean
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.config import TestbedConfig

QUICK: dict[str, Any] = {
    "corpus_scale": 0.5, "pretraining_steps": 300, "sae_steps": 100, "sae_windows": 600,
    "feature_windows": 150, "sft_windows": 320, "sampled_prompts": 120, "evaluation_windows": 100,
    "arms": ["sasft_combined", "token_penalty", "random_features"], "seeds": [101],
}  # fmt: skip
QUICK_REPETITION: dict[str, Any] = {
    "habit_steps": 700, "rare_steps": 150, "loop_samples": 6000, "sae_steps": 200, "sae_documents": 1500,
    "strengths": [1.0], "weak_strengths": [0.75], "scan_samples": 32, "scan_fresh_samples": 96, "seeds": [0],
    "updates": 20, "sampled_problems": 1000,
    "benign_problems": 500, "arms": ["plain", "default", "random"],
}  # fmt: skip
PREFIX = "repetition_"
SHARED = ("workers", "cache", "no_cache")
"""Settings that both halves take from the first"""


@dataclass
class DemoArguments:
    """What to run and where the results go; every setting of both halves is an option beside these, those of the second
    with the prefix `repetition_`."""

    output: str = field(default="runs/demo", metadata={"help": "Folder for report.html, summary.json and the rest."})
    part: Literal["both", "switching", "repetition"] = field(
        default="both",
        metadata={"help": "SASFT against language switching, steered DAPO against endless repetition, or both."},
    )
    quick: bool = field(
        default=False,
        metadata={"help": "A smaller run in about five minutes: the same chain, with figures that prove little."},
    )
    repetition: str = field(
        default="{}",
        metadata={"help": 'JSON with several --repetition_... options, over which it wins: {"seeds": [0, 1]}.'},
    )


def run(arguments: Sequence[str]) -> int:
    """Parse (`--config FILE` works here too), run, and return the exit status."""
    kinds = (DemoArguments, TestbedConfig, repetition_arguments())
    parser = CommandParser(kinds, mappings=["repetition"], prog="qscope demo")
    demo, config, second = parser.build(arguments)
    if demo.quick:
        quick = QUICK | {PREFIX + name: value for name, value in QUICK_REPETITION.items()}
        demo, config, second = parser.build(arguments, quick)
    given = {name.removeprefix(PREFIX): value for name, value in vars(second).items()}
    shared = {name: getattr(config, name) for name in SHARED}
    repetition = ArithmeticConfig(**{**shared, **given, **_from_json(demo.repetition, parser)})
    from qscope_posttrain.testbed.demo import run_demo

    run_demo(
        None if demo.part == "repetition" else config,
        demo.output,
        None if demo.part == "switching" else repetition,
    )
    return 0


def repetition_arguments() -> type:
    """A dataclass with the fields of ArithmeticConfig under the prefix `repetition_`, but for what the halves share."""
    hints = get_type_hints(ArithmeticConfig)
    made: list[tuple[str, Any, Any]] = []
    for entry in dataclasses.fields(ArithmeticConfig):
        default: dict[str, Any] = {"default": entry.default}
        if entry.default is dataclasses.MISSING:
            default = {"default_factory": entry.default_factory}
        if entry.name not in SHARED:
            made.append((PREFIX + entry.name, hints[entry.name], field(metadata=entry.metadata, **default)))
    return dataclasses.make_dataclass("RepetitionArguments", made)


def _from_json(text: Any, parser: CommandParser) -> dict[str, Any]:
    """Settings of the second half that `--repetition` gives, checked as the options are."""
    try:
        given = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise UserValueError(f"--repetition must be a JSON object; got {text!r} ({error}).") from error
    if not isinstance(given, dict):
        raise UserValueError(f"--repetition must be a JSON object; got {text!r}.")
    known = ArithmeticConfig.__dataclass_fields__
    unknown = sorted(map(str, set(given) - set(known)))
    if unknown:
        raise UserValueError(
            f"--repetition has no setting {', '.join(unknown)}; there are {', '.join(known)}."
            f"{did_you_mean(unknown[0], known)}"
        )
    options = {name if name in SHARED else PREFIX + name: value for name, value in given.items()}
    checked = parser.checked(options, {}, "--repetition")
    return {name.removeprefix(PREFIX): value for name, value in checked.items()}
