"""What a recipe may say: the dataclasses whose fields are the keys of `qscope sft`."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import inspect
import itertools
import textwrap
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from qscope_posttrain.cli.parser import RecipeParser
from qscope_posttrain.cli.recipe import DeviceRule, TrainingRecipe, check_model_named
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sft.config import SASFTConfig

PREFIX = "sasft_"


@dataclass
class RunArguments:
    """The keys of `qscope sft` beside those of TRL (ScriptArguments, DatasetMixtureConfig, SFTConfig, ModelConfig)."""

    method: Literal["sasft", "token_penalty", "sft"] = field(
        default="sasft",
        metadata={
            "help": "sasft: the penalty on features. Baselines: token_penalty (on the probability of target-language "
            "tokens, with sasft_weight and sasft_target), sft (TRL alone)."
        },
    )
    features: str | None = field(
        default=None, metadata={"help": "FeatureSet file written by `qscope features find`; needed by method sasft."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything that can be checked without training, print it, and stop."}
    )

    def __post_init__(self) -> None:
        if self.method == "sasft" and self.features is None:
            raise UserValueError(
                "method sasft needs 'features', a file written by `qscope features find`; "
                "give it, or choose method: sft for training without a penalty."
            )


def sasft_arguments() -> type:
    """A dataclass with the fields of `SASFTConfig` under the prefix `sasft_`, in types that an argument parser knows.

    In a recipe all keys lie side by side with two hundred of TRL's, where `weight` or `top` alone would say little.
    Made from SASFTConfig, so that there is one place where an option is declared, documented and checked.
    """
    hints, explanations = get_type_hints(SASFTConfig), field_docstrings(SASFTConfig)
    fields: list[tuple[str, Any, Any]] = []
    for option in dataclasses.fields(SASFTConfig):
        # A percent sign in a help text would be read by argparse as a format.
        text = explanations.get(option.name, "").replace("%", "%%")
        default = option.default
        settings: dict[str, Any] = {"metadata": {"help": text}}
        if isinstance(default, tuple):
            settings["default_factory"] = lambda value=default: list(value)
        else:
            settings["default"] = default
        fields.append((PREFIX + option.name, _parsable(hints[option.name]), field(**settings)))
    return dataclasses.make_dataclass("SASFTArguments", fields)


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingRecipe):
    """Everything that one run of `qscope sft` was asked for."""

    run: RunArguments
    penalty: SASFTConfig
    training: SFTConfig

    def own_keys(self) -> dict[str, Any]:
        return {PREFIX + name: value for name, value in self.penalty.to_dict().items()}


def parse_recipe(arguments: Sequence[str]) -> Recipe:
    """Read `--config FILE` and the overrides beside it.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: unknown key, wrong value, options that exclude each other, or a recipe for a GPU without one.
    """
    device = DeviceRule()
    kinds = (RunArguments, sasft_arguments(), ScriptArguments, DatasetMixtureConfig, SFTConfig, ModelConfig)
    parser = RecipeParser(kinds, before_build=device, prog="qscope sft")
    run, penalty, script, mixture, training, model = parser.parse(arguments)
    check_model_named(model)
    return Recipe(
        run=run,
        penalty=_sasft_config(penalty),
        script=script,
        mixture=mixture,
        training=training,
        model=model,
        assumed_cpu=device.assumed_cpu,
    )


def _sasft_config(arguments: Any) -> SASFTConfig:
    values = {name.removeprefix(PREFIX): value for name, value in vars(arguments).items()}
    try:
        return SASFTConfig(**cast("dict[str, Any]", values))
    except ValueError as error:
        raise UserValueError(f"{error} (In recipes these options begin with '{PREFIX}'.)") from error


def field_docstrings(kind: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, by field, as one line each."""
    body = cast("ast.ClassDef", ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]).body
    found: dict[str, str] = {}
    for previous, statement in itertools.pairwise(body):
        if not (isinstance(previous, ast.AnnAssign) and isinstance(previous.target, ast.Name)):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            found[previous.target.id] = " ".join(str(statement.value.value).split())
    return found


def _parsable(hint: Any) -> Any:
    """A type that an argument parser can read: a list for a tuple, and no callables, which no text can give."""
    if get_origin(hint) is tuple:
        return list[get_args(hint)[0]]  # type: ignore[misc]
    if get_origin(hint) in (Union, types.UnionType):
        kept = [_parsable(kind) for kind in get_args(hint) if not _is_callable(kind)]
        return Union[tuple(kept)]  # noqa: UP007 - the members are computed
    return hint


def _is_callable(hint: Any) -> bool:
    return get_origin(hint) is collections.abc.Callable
