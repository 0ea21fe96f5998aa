"""`qscope demo`: both methods on tiny models, from training data to a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qscope_posttrain.cli.parser import RecipeParser
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.config import TestbedConfig

QUICK = {
    "corpus_scale": "0.5", "pretraining_steps": "300", "sae_steps": "100", "sae_windows": "600",
    "feature_windows": "150", "sft_windows": "320", "sampled_prompts": "120", "evaluation_windows": "100",
}  # fmt: skip
QUICK_LISTS = {"arms": ["sasft_combined", "token_penalty", "random_features"], "seeds": ["101"]}
QUICK_REPETITION: dict[str, Any] = {
    "habit_steps": 700, "rare_steps": 150, "loop_samples": 6000, "sae_steps": 200, "sae_documents": 1500,
    "strengths": [1.0], "weak_strengths": [0.75], "scan_samples": 32, "scan_fresh_samples": 96, "seeds": [0],
    "updates": 20, "sampled_problems": 1000,
    "benign_problems": 500, "arms": ["plain", "default", "random"],
}  # fmt: skip


@dataclass
class DemoArguments:
    """What to run and where the results go; every setting of the first half is an option beside these."""

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
        metadata={"help": 'JSON with settings of the second half, e.g. {"seeds": [0, 1, 2, 3], "arms": ["paper"]}.'},
    )


def run(arguments: Sequence[str]) -> int:
    """Parse (`--config FILE` works here too), run, and return the exit status."""
    parser = RecipeParser((DemoArguments, TestbedConfig), prog="qscope demo")
    demo, config = parser.parse(arguments)
    if demo.quick:
        # In front: what the user says wins.
        demo, config = parser.parse([*_quick_arguments(), *arguments])
    repetition = arithmetic_config(demo.repetition, QUICK_REPETITION if demo.quick else {}, config)
    from qscope_posttrain.testbed.demo import run_demo

    run_demo(
        None if demo.part == "repetition" else config,
        demo.output,
        None if demo.part == "switching" else repetition,
    )
    return 0


def arithmetic_config(text: str, defaults: dict[str, Any], config: TestbedConfig) -> ArithmeticConfig:
    """Settings of the second half from JSON `text` over `defaults`; cache and workers are those of the first.

    Raises:
        ValueError: not a JSON object, or a setting that does not exist.
    """
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserValueError(f"--repetition must be a JSON object; got {text!r} ({error}).") from error
    known = ArithmeticConfig.__dataclass_fields__
    unknown = sorted(set(given) - set(known)) if isinstance(given, dict) else [text]
    if unknown:
        raise UserValueError(f"--repetition has no setting {', '.join(unknown)}; there are {', '.join(known)}.")
    shared = {"workers": config.workers, "cache": config.cache, "no_cache": config.no_cache}
    return ArithmeticConfig(**{**shared, **defaults, **given})


def _quick_arguments() -> list[str]:
    arguments = [token for name, value in QUICK.items() for token in (f"--{name}", value)]
    for name, values in QUICK_LISTS.items():
        arguments += [f"--{name}", *values]
    return arguments
