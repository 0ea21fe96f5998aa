"""`qscope grpo`: TRL's GRPOTrainer with negatives in each group, from a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.training import TrainingRecipe, before_trl, check_values
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.summary import writable_folder

RewardSpec = str | Mapping[str, Any]
_DECLARED = (
    ("qscope_posttrain.cli.training.grpo", "GRPORunArguments"),
    ("qscope_posttrain.rl.config", "SteeredGRPOConfig"),
)


@dataclass
class GRPORunArguments:
    """The keys of `qscope grpo` beside those of SteeredGRPOConfig and of TRL."""

    rewards: list[str] = field(default_factory=list)
    """Reward functions, in the order of reward_weights: a name (repetition_penalty, ngram_repetition,
    language_consistency, or one of trl.rewards such as accuracy_reward), the dotted path of a callable, or a mapping
    with 'name' and the options of that reward. A mapping on the command line is written as JSON."""
    features: str | None = None
    """FeatureSet file written by `qscope features find-repetition`; required by negative: feature. An empty text ('')
    removes that of the recipe."""
    dry_run: bool = False
    """Check everything that can be checked without training, print it, and stop."""
    device_memory: float | None = None
    """Memory of a GPU in GiB, for a dry run with use_vllm on a machine without that GPU: how many rows fit."""

    def __post_init__(self) -> None:
        self.features = self.features or None
        if self.device_memory is not None and not self.dry_run:
            raise UserValueError("device_memory is read by --dry_run alone; leave it out.")
        if self.device_memory is not None and self.device_memory <= 0:
            raise UserValueError(f"device_memory must be positive, in GiB; got {self.device_memory}.")
        specs: list[Any] = [_reward_spec(entry) for entry in self.rewards]
        if not specs:
            raise UserValueError(
                "a recipe needs 'rewards', a list of reward functions, for example rewards: [accuracy_reward]."
            )
        self.rewards = specs


def run(arguments: Sequence[str]) -> int:
    """Parse, then check (`--dry_run`) or train. Returns the exit status."""
    recipe = parse_recipe(arguments)
    from qscope_posttrain.cli.training import grpo_checks, run
    from qscope_posttrain.rl.metrics import final_metrics, results_table
    from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

    if recipe.run.dry_run:
        return grpo_checks.check_recipe(recipe).report()
    writable_folder(recipe.output)
    features = grpo_checks.needed_features(recipe)
    inputs = {**grpo_checks.prepare(recipe, features), "features": features}
    trainer = run.make_trainer(
        recipe, SteeredGRPOTrainer, model=recipe.model_name, args=recipe.trainer_arguments(), **inputs
    )

    def report(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        table = results_table(log)
        table.print()
        return {"final": final_metrics(log), "table": table}

    return run.run_training(recipe, trainer, "grpo", features, report)


def parse_recipe(arguments: Sequence[str]) -> TrainingRecipe:
    """Read `--config FILE` and the overrides beside it.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: unknown key, wrong value, options that exclude each other or erase the negatives, or a recipe for a
            GPU without one.
    """
    arguments = before_trl(arguments, "qscope grpo", _DECLARED, "GRPOConfig")
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from qscope_posttrain.rl.config import SteeredGRPOConfig

    kinds = (GRPORunArguments, ScriptArguments, DatasetMixtureConfig, SteeredGRPOConfig, ModelConfig)
    parser = CommandParser(kinds, before_build=check_values, mappings=["rewards"], prog="qscope grpo")
    run, script, mixture, training, model = parser.build(arguments)
    if training.has_negatives and training.negative == "feature" and run.features is None:
        raise UserValueError(
            "negative: feature needs 'features', a file written by `qscope features find-repetition`; give it, or "
            "choose negative: seeded, which needs none, or negatives_per_group: 0 for plain DAPO."
        )
    training = training.settled(run.features is not None)
    parts = {"run": run, "script": script, "mixture": mixture, "training": training, "model": model}
    return TrainingRecipe(**parts, assumed_cpu=parser.values.assumed_cpu)


def _reward_spec(entry: Any) -> RewardSpec:
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        try:
            entry = json.loads(entry)
        except json.JSONDecodeError as error:
            raise UserValueError(f"rewards: not JSON ({error.msg}): {entry}") from error
    if isinstance(entry, str) and entry.strip():
        return entry.strip()
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        return dict(entry)
    raise UserValueError(f"rewards: expected a name, a dotted path, or a mapping with 'name'; got {entry!r}.")
