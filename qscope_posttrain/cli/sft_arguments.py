"""What a recipe may say: the dataclasses whose fields are the keys of `qscope sft`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from qscope_posttrain.cli.config_arguments import arguments_of
from qscope_posttrain.cli.parser import RecipeParser
from qscope_posttrain.cli.recipe import DeviceRule, TrainingRecipe, check_model_named
from qscope_posttrain.errors import UserValueError, did_you_mean
from qscope_posttrain.report.progress import status
from qscope_posttrain.sft.config import KLAnchorConfig, LossConfig, SASFTConfig, TokenPenaltyConfig

METHODS: dict[str, tuple[type[LossConfig], str]] = {
    "sasft": (SASFTConfig, "sasft_"),
    "token_penalty": (TokenPenaltyConfig, "token_penalty_"),
    "kl_anchor": (KLAnchorConfig, "anchor_"),
}
"""Method -> its settings, and how their keys begin"""
ANCHOR_WEIGHT = "anchor_weight"
"""The key of every method with an anchor; `sasft_anchor_weight` and `token_penalty_anchor_weight` are the same"""


@dataclass
class RunArguments:
    """The keys of `qscope sft` beside those of TRL (ScriptArguments, DatasetMixtureConfig, SFTConfig, ModelConfig)."""

    method: Literal["sasft", "token_penalty", "kl_anchor", "sft"] = field(
        default="sasft",
        metadata={
            "help": "sasft: the penalty on features (keys sasft_...). token_penalty: on the probability of tokens of "
            "the target language, without an SAE (token_penalty_...). kl_anchor: to the starting model alone "
            "(anchor_...). The first two take anchor_weight as well. sft: TRL alone, as the control of any recipe."
        },
    )
    features: str | None = field(
        default=None, metadata={"help": "FeatureSet file written by `qscope features find`; for method sasft, needed."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything that can be checked without training, print it, and stop."}
    )

    def __post_init__(self) -> None:
        if self.method == "sasft" and self.features is None:
            raise UserValueError(
                "method sasft needs 'features', a file written by `qscope features find`; give it, or choose method: "
                "token_penalty, which needs none, or method: sft for training without a penalty."
            )
        if self.method in ("token_penalty", "kl_anchor") and self.features is not None:
            raise UserValueError(f"method {self.method} uses no features; leave 'features' out, or use method: sasft.")


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingRecipe):
    """Everything that one run of `qscope sft` was asked for."""

    run: RunArguments
    penalty: Any
    """The settings of the method, a `LossConfig`; None for method sft"""
    training: SFTConfig

    def own_keys(self) -> dict[str, Any]:
        if self.penalty is None:
            return {}
        prefix = METHODS[self.run.method][1]
        # One key for the anchor's weight, whichever it was read from.
        return {
            name if name == ANCHOR_WEIGHT else prefix + name: value for name, value in self.penalty.to_dict().items()
        }


def parse_recipe(arguments: Sequence[str]) -> Recipe:
    """Read `--config FILE` and the overrides beside it.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: unknown key, wrong value, options that exclude each other, a key of another method, or a recipe for
            a GPU without one.
    """
    device = DeviceRule()
    losses = [arguments_of(kind, prefix) for kind, prefix in METHODS.values()]
    kinds = (RunArguments, *losses, ScriptArguments, DatasetMixtureConfig, SFTConfig, ModelConfig)
    parser = RecipeParser(kinds, before_build=device, prog="qscope sft")
    run, *own, script, mixture, training, model = parser.parse(arguments)
    check_model_named(model)
    given = {key: value for part in own for key, value in vars(part).items() if value is not None}
    return Recipe(
        run=run,
        penalty=_settings(run.method, given, parser.said),
        script=script,
        mixture=mixture,
        training=training,
        model=model,
        assumed_cpu=device.assumed_cpu,
    )


def _settings(method: str, given: dict[str, Any], said: Collection[str]) -> LossConfig | None:
    """The settings of a method from the keys that were given; those in `said` are from the command line.

    The control, method sft, passes over all of them.
    """
    if method == "sft":
        if given:
            status(f"method sft trains without a penalty: no effect have {', '.join(given)}")
        return None
    kind, prefix = METHODS[method]
    keys = {prefix + name: name for name in kind.__dataclass_fields__}
    if prefix + ANCHOR_WEIGHT in keys:
        keys[ANCHOR_WEIGHT] = ANCHOR_WEIGHT
    foreign = [key for key in given if key not in keys]
    if foreign:
        raise UserValueError(" ".join(_not_of(method, key, keys) for key in foreign))
    values: dict[str, Any] = {}
    by_key: dict[str, str] = {}
    for key in sorted(given, key=lambda key: key not in said):
        name, value = keys[key], given[key]
        other = by_key.setdefault(name, key)
        if other in said and key not in said:
            continue  # the command line goes before the file
        if other != key and values[name] != value:
            raise UserValueError(
                f"'{prefix}{name}' and '{name}' are the same option; got {values[name]!r} and {value!r}. Give one."
            )
        values[name] = value
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise UserValueError(f"{error} (In recipes these options begin with '{prefix}'.)") from error


def _not_of(method: str, key: str, keys: dict[str, str]) -> str:
    """A sentence about a key that another method uses."""
    owner, prefix = next((name, prefix) for name, (_, prefix) in METHODS.items() if key.startswith(prefix))
    same = METHODS[method][1] + key.removeprefix(prefix)
    hint = f" Did you mean '{same}'?" if same in keys else did_you_mean(key, sorted(keys))
    return f"method {method} does not use '{key}', a key of method {owner}.{hint or ' Leave it out.'}"
