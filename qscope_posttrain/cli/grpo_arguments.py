"""What a recipe may say: the dataclasses whose fields are the keys of `qscope grpo`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from qscope_posttrain.cli.parser import RecipeParser
from qscope_posttrain.cli.recipe import DeviceRule, TrainingRecipe, check_model_named
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.rl.config import SteeredGRPOConfig

RewardSpec = str | Mapping[str, Any]


@dataclass
class GRPORunArguments:
    """The keys of `qscope grpo` beside those of TRL (ScriptArguments, DatasetMixtureConfig, ModelConfig) and
    SteeredGRPOConfig."""

    rewards: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward functions, in the order of reward_weights: a name (repetition_penalty, ngram_repetition, "
            "language_consistency, or one of trl.rewards such as accuracy_reward), the dotted path of a callable, or a "
            "mapping with 'name' and the options of that reward. A mapping on the command line is written as JSON."
        },
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "FeatureSet file written by `qscope features find-repetition`; needed by negative: feature. ''"
            " takes away that of the recipe."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything that can be checked without training, print it, and stop."}
    )

    def __post_init__(self) -> None:
        self.features = self.features or None
        specs: list[Any] = [_reward_spec(entry) for entry in self.rewards]
        if not specs:
            raise UserValueError(
                "a recipe needs 'rewards', a list of reward functions, for example rewards: [accuracy_reward]."
            )
        self.rewards = specs


@dataclass(frozen=True, kw_only=True)
class GRPORecipe(TrainingRecipe):
    """Everything that one run of `qscope grpo` was asked for."""

    run: GRPORunArguments
    training: SteeredGRPOConfig

    @property
    def rewards(self) -> Sequence[RewardSpec]:
        """Names, dotted paths, and mappings with a name and options."""
        return self.run.rewards

    def training_keys(self) -> dict[str, Any]:
        # steps_per_generation says the same for any number of processes; with both, TRL would refuse to read them back.
        return super().training_keys() | {"generation_batch_size": None}


def parse_recipe(arguments: Sequence[str]) -> GRPORecipe:
    """Read `--config FILE` and the overrides beside it.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: unknown key, wrong value, options that exclude each other or erase the negatives, or a recipe for a
            GPU without one.
    """
    device = DeviceRule()
    kinds = (GRPORunArguments, ScriptArguments, DatasetMixtureConfig, SteeredGRPOConfig, ModelConfig)
    parser = RecipeParser(kinds, before_build=device, mappings=["rewards"], prog="qscope grpo")
    run, script, mixture, training, model = parser.parse(arguments)
    check_model_named(model)
    if training.has_negatives and training.negative == "feature" and run.features is None:
        raise UserValueError(
            "negative: feature needs 'features', a file written by `qscope features find-repetition`; give it, or "
            "choose negative: seeded, which needs none, or negatives_per_group: 0 for plain DAPO."
        )
    training = training.settled(run.features is not None)
    return GRPORecipe(
        run=run, script=script, mixture=mixture, training=training, model=model, assumed_cpu=device.assumed_cpu
    )


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
