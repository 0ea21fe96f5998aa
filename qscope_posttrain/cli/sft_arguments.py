"""What a recipe may say: the dataclasses whose fields are the keys of `qscope sft`."""

from __future__ import annotations

import argparse
import ast
import collections.abc
import dataclasses
import inspect
import itertools
import textwrap
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from qscope_posttrain.cli.parser import RecipeParser
from qscope_posttrain.report.summary import to_json
from qscope_posttrain.sft.config import SASFTConfig

PREFIX = "sasft_"
_SECRETS = frozenset({"hub_token", "push_to_hub_token"})


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
            raise ValueError(
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


@dataclass(frozen=True)
class Recipe:
    """Everything that one run of `qscope sft` was asked for."""

    run: RunArguments
    penalty: SASFTConfig
    script: ScriptArguments
    mixture: DatasetMixtureConfig
    training: SFTConfig
    model: ModelConfig
    assumed_cpu: bool = False
    """A dry run on a machine without the GPU that the recipe asks for"""

    @property
    def model_name(self) -> str:
        """Folder or hub id of the starting model."""
        return str(self.model.model_name_or_path)

    @property
    def output(self) -> Path:
        """Where the model and the reports go."""
        return Path(str(self.training.output_dir))

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, JSON-ready; read back by `parse_recipe`, it gives the same recipe."""
        penalty = {PREFIX + name: value for name, value in self.penalty.to_dict().items()}
        parts = [dataclasses.asdict(part) for part in (self.run, self.script, self.mixture, self.model)]
        training = self.training.to_dict()
        # transformers writes <EOS_TOKEN> and the like for every field that might be a secret. Most are words of the
        # tokenizer; the real secrets are left out.
        training |= {key: getattr(self.training, key) for key in training if key.endswith("_token")}
        training |= dict.fromkeys(_SECRETS.intersection(training))
        return to_json({**parts[0], **penalty, **parts[1], **parts[2], **training, **parts[3]})


def parse_recipe(arguments: Sequence[str]) -> Recipe:
    """Read `--config FILE` and the overrides beside it.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: unknown key, wrong value, options that exclude each other, or a recipe for a GPU without one.
    """
    assumed_cpu = False

    def check_device(values: argparse.Namespace) -> None:
        nonlocal assumed_cpu
        assumed_cpu = _check_device(values)

    kinds = (RunArguments, sasft_arguments(), ScriptArguments, DatasetMixtureConfig, SFTConfig, ModelConfig)
    parser = RecipeParser(kinds, before_build=check_device, prog="qscope sft")
    run, penalty, script, mixture, training, model = parser.parse(arguments)
    if not model.model_name_or_path:
        raise ValueError("a recipe needs 'model_name_or_path': a folder or a hub id.")
    return Recipe(run, _sasft_config(penalty), script, mixture, training, model, assumed_cpu)


def _check_device(values: argparse.Namespace) -> bool:
    """Refuse to train without the GPU that a recipe asks for; for a dry run assume the CPU, and return True."""
    import torch

    here = torch.accelerator.is_available()
    if values.dry_run:
        assume = not here and not values.use_cpu
        values.use_cpu = values.use_cpu or assume
        return bool(assume)
    remedy = "--use_cpu true --bf16 false --use_liger_kernel false --gradient_checkpointing false"
    if not here and not values.use_cpu:
        raise ValueError(
            "this recipe trains on a GPU, and this machine has none. To check the recipe here: --dry_run. "
            f"To train on the CPU all the same: {remedy}."
        )
    if values.use_cpu and values.use_liger_kernel:
        raise ValueError(f"use_liger_kernel needs a GPU, and use_cpu is on. To train on the CPU: {remedy}.")
    return False


def _sasft_config(arguments: Any) -> SASFTConfig:
    values = {name.removeprefix(PREFIX): value for name, value in vars(arguments).items()}
    try:
        return SASFTConfig(**cast("dict[str, Any]", values))
    except ValueError as error:
        raise ValueError(f"{error} (In recipes these options begin with '{PREFIX}'.)") from error


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
