"""What the recipes of all training commands have in common: TRL's dataclasses, paths, and one dictionary of keys."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import check_plain
from qscope_posttrain.report.summary import to_json
from qscope_posttrain.text.jsonl import read_json

_SECRETS = frozenset({"hub_token", "push_to_hub_token"})
_SETTINGS_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
"""Keys that may name a JSON file, which transformers opens"""
_SECRET_WORDS = ("token", "api_key", "password", "secret")
"""How the names of secrets end below the top level, where no words of a tokenizer stand: `model_init_kwargs.token`"""


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Everything that one training command was asked for; each command adds what is its own."""

    run: Any
    """The keys of the command beside those of TRL: a dataclass with at least `features` and `dry_run`"""
    script: ScriptArguments
    mixture: DatasetMixtureConfig
    training: Any
    """SFTConfig, or SteeredGRPOConfig"""
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
        """Every key with its value, JSON-ready; read back by the command's parser, it gives the same recipe."""
        parts = [dataclasses.asdict(part) for part in (self.run, self.script, self.mixture, self.model)]
        return to_json({**parts[0], **self.own_keys(), **parts[1], **parts[2], **self.training_keys(), **parts[3]})

    def own_keys(self) -> dict[str, Any]:
        """Keys of dataclasses that only this command has."""
        return {}

    def training_keys(self) -> dict[str, Any]:
        """The training arguments, with the names of tokens and without secrets."""
        training: dict[str, Any] = self.training.to_dict()
        # transformers writes <EOS_TOKEN> and the like for every field that might be a secret. Most are words of the
        # tokenizer; the real secrets are left out.
        training |= {key: getattr(self.training, key) for key in training if key.endswith("_token")}
        return without_secrets(training) | dict.fromkeys(_SECRETS.intersection(training))

    def trainer_arguments(self) -> Any:
        """The training arguments for the trainer, which may change them; the recipe stays what was asked for.

        What the trainer passes to `from_pretrained` is `model_init_kwargs`, and ModelConfig's fields below them.
        """
        model, given = self.model, self.training.model_init_kwargs or {}
        own = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
        # Not `replace`: the checks of training arguments refuse some of the values that they set themselves.
        arguments = copy.copy(self.training)
        for name, value in vars(arguments).items():
            if isinstance(value, dict | list):
                setattr(arguments, name, copy.deepcopy(value))
        arguments.model_init_kwargs = own | copy.deepcopy(given)
        return arguments


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that may be written to disk and pushed to a hub: below the top level, secrets become None."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: None if str(name).endswith(_SECRET_WORDS) else cleaned(one) for name, one in value.items()}
        return [cleaned(one) for one in value] if isinstance(value, list | tuple) else value

    return {name: cleaned(value) for name, value in settings.items()}


class DeviceRule:
    """Called with all values before the dataclasses are made: no training without the GPU that a recipe asks for.

    For a dry run it assumes the CPU where there is no GPU, and says so in `assumed_cpu`.
    """

    def __init__(self) -> None:
        self.assumed_cpu = False

    def __call__(self, values: argparse.Namespace) -> None:
        """Raises:
        ValueError: a recipe for a GPU, or an option that needs one, on a machine without; an empty batch; a seed that
            not every generator takes; text for a mapping, or a settings file that cannot be read.
        """
        import torch

        for name in ("seed", "data_seed"):
            seed = getattr(values, name)
            if seed is not None and not 0 <= seed < 1 << 32:
                raise UserValueError(f"{name} must be a whole number from 0 to {(1 << 32) - 1}; got {seed}.")
        for name, value in vars(values).items():
            text = value.strip() if isinstance(value, str) else ""
            if name.endswith("_kwargs") and text and not text.startswith("{"):
                raise UserValueError(f"{name} must be a mapping, on the command line as JSON; got {value!r}.")
            if name in _SETTINGS_FILES and text and Path(text).exists():
                check_plain(text, f"file of {name}", marked=False)
                read_json(text)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(values, name) < 1:
                raise UserValueError(f"{name} must be at least 1; got {getattr(values, name)}.")
        here = torch.accelerator.is_available()
        if values.dry_run:
            self.assumed_cpu = bool(not here and not values.use_cpu)
            values.use_cpu = values.use_cpu or self.assumed_cpu
            return
        remedy = "--use_cpu true --bf16 false --use_liger_kernel false --gradient_checkpointing false"
        if not here and not values.use_cpu:
            raise UserValueError(
                "this recipe trains on a GPU, and this machine has none. To check the recipe here: --dry_run. "
                f"To train on the CPU all the same: {remedy}."
            )
        if values.use_cpu and values.use_liger_kernel:
            raise UserValueError(f"use_liger_kernel needs a GPU, and use_cpu is on. To train on the CPU: {remedy}.")


def check_model_named(model: ModelConfig) -> None:
    """ValueError for a recipe that names no model."""
    if not model.model_name_or_path:
        raise UserValueError("a recipe needs 'model_name_or_path': a folder or a hub id.")
