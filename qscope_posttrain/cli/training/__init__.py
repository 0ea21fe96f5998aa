"""Recipes of the training commands: TRL's dataclasses, the checks before they are made, features and resolved.yaml."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from qscope_posttrain.cli.parsing.fields import print_declared
from qscope_posttrain.cli.parsing.parser import check_seed
from qscope_posttrain.cli.parsing.recipes import code_requests, split_arguments
from qscope_posttrain.distributed import check_devices, join_processes
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import check_plain, read_json, text_suffix
from qscope_posttrain.models.loading import load_tokenizer
from qscope_posttrain.provenance import file_sha256, package_versions
from qscope_posttrain.report.progress import is_main_process, status
from qscope_posttrain.report.summary import to_json, write_text
from qscope_posttrain.text.inputs import READERS, check_data_file, read_splits, reading, split_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from qscope_posttrain.features.feature_set import FeatureSet

Rows: TypeAlias = "Dataset | IterableDataset"

RESOLVED = "resolved.yaml"
_NOT_WRITTEN = frozenset({"hub_token", "push_to_hub_token", "generation_batch_size"})
_SETTINGS_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
"""Keys that may name a JSON file, which transformers opens"""
_SECRET_WORDS = ("token", "api_key", "password", "secret")
"""How the names of secrets end below the top level, where no words of a tokenizer stand: `model_init_kwargs.token`"""
_DATA = "give the training data as 'dataset_name' or as 'datasets'; the recipe has {}."


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """All settings of one training command."""

    run: Any  # The keys of the command beside those of TRL: a dataclass with at least `features` and `dry_run`
    script: ScriptArguments
    mixture: DatasetMixtureConfig
    training: Any  # SFTConfig, or SteeredGRPOConfig
    model: ModelConfig
    penalty: Any = None  # The settings of the method of `qscope sft`, a `LossConfig`
    own: Mapping[str, Any] = field(default_factory=dict)  # The keys and values of `penalty`
    assumed_cpu: bool = False  # A dry run on a machine without the GPU that the recipe asks for

    @property
    def model_name(self) -> str:
        """Folder or hub id of the starting model."""
        return str(self.model.model_name_or_path)

    @property
    def output(self) -> Path:
        """Folder of the model and the reports."""
        return Path(str(self.training.output_dir))

    @property
    def trusts_code(self) -> bool:
        """Whether Python files of the model's repository may run, in the dry run as in training."""
        given = self.training.model_init_kwargs or {}
        return bool(given.get("trust_remote_code", self.training.trust_remote_code))

    def load_tokenizer(self) -> Any:
        """The starting model's tokenizer, as its files have it."""
        return load_tokenizer(self.model_name, self.model.model_revision, self.trusts_code)

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, JSON-ready; read back by the command's parser, it gives the same recipe."""
        parts = [dataclasses.asdict(part) for part in (self.run, self.script, self.mixture, self.model)]
        return to_json({**parts[0], **self.own, **parts[1], **parts[2], **self._training_keys(), **parts[3]})

    def _training_keys(self) -> dict[str, Any]:
        """The training arguments, with the names of tokens and without secrets."""
        training: dict[str, Any] = self.training.to_dict()
        # transformers writes <EOS_TOKEN> and the like for every field that might be a secret. Most are words of the
        # tokenizer; the real secrets are left out.
        training |= {key: getattr(self.training, key) for key in training if key.endswith("_token")}
        # steps_per_generation says the same as generation_batch_size for any number of processes; with both, TRL would
        # refuse to read them back.
        return _without_secrets(training) | dict.fromkeys(_NOT_WRITTEN.intersection(training))

    def trainer_arguments(self) -> Any:
        """A copy of the training arguments for the trainer, which may change them. What the trainer passes to
        `from_pretrained` is `model_init_kwargs`, and ModelConfig's fields below them."""
        model, given = self.model, self.training.model_init_kwargs or {}
        own = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
        # Not `replace`: the checks of training arguments refuse some of the values that they set themselves.
        arguments = copy.copy(self.training)
        for name, value in vars(arguments).items():
            if isinstance(value, dict | list):
                setattr(arguments, name, copy.deepcopy(value))
        arguments.model_init_kwargs = own | copy.deepcopy(given)
        return arguments

    def load_features(self) -> FeatureSet | None:
        """The FeatureSet of the recipe, if it names one."""
        from qscope_posttrain.features.feature_set import FeatureSet

        return None if self.run.features is None else FeatureSet.load(self.run.features)

    def feature_origins(self, features: FeatureSet | None) -> dict[str, Any]:
        """The feature file, its sha256 and the provenance of its features."""
        from qscope_posttrain.features.feature_set_file import feature_set_path

        if features is None or self.run.features is None:
            return {}
        path = feature_set_path(self.run.features)
        return {"file": str(path), "sha256": file_sha256(path), "provenance": dict(features.provenance)}

    def resolved_yaml(self, features: FeatureSet | None) -> str:
        """The whole configuration as a recipe that `--config` reads, below versions and hashes as comments."""
        origins: dict[str, Any] = {"versions": package_versions(), "features": self.feature_origins(features)}
        values = self.to_dict()
        if asked := code_requests(values):
            origins = {"read back with": f"--allow-code, for it names code: {'; '.join(asked)}"} | origins
        comments = yaml.safe_dump(origins, sort_keys=False, allow_unicode=True, width=1000)
        keys = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        return "".join(f"# {line}\n" for line in comments.splitlines()) + "\n" + keys

    def write_resolved(self, features: FeatureSet | None) -> None:
        """Write `resolved.yaml` into the output folder, from the main process alone."""
        if is_main_process():
            write_text(self.output / RESOLVED, self.resolved_yaml(features))
            status(f"configuration written to {self.output / RESOLVED}")


def check_values(values: argparse.Namespace) -> None:
    """Check all values before the dataclasses are made; above all, no training without the GPU that a recipe needs.

    For a dry run, the CPU is assumed where there is no GPU, and `values.assumed_cpu` says so. ValueError as well for no
    model, an empty batch, a seed that not every generator takes, text for a mapping, or a settings file that cannot be
    read.
    """
    import torch

    for name in ("seed", "data_seed"):
        check_seed(name, getattr(values, name))
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
    without = not torch.accelerator.is_available() and not values.use_cpu
    values.assumed_cpu = bool(without and values.dry_run)
    missing = _missing(vars(values))
    if missing and (not values.model_name_or_path or (without and not values.dry_run)):
        raise UserValueError(missing)
    if values.dry_run:
        values.use_cpu = values.use_cpu or values.assumed_cpu
        return
    remedy = "--use_cpu true --bf16 false --use_liger_kernel false --gradient_checkpointing false"
    if without:
        raise UserValueError(
            "this recipe trains on a GPU, and this machine has none. To check the recipe here: --dry_run. "
            f"To train on the CPU all the same: {remedy}."
        )
    if not values.use_cpu:
        check_devices()
        return
    if values.use_liger_kernel:
        raise UserValueError(f"use_liger_kernel needs a GPU, and use_cpu is on. To train on the CPU: {remedy}.")
    join_processes("cpu", values.ddp_timeout, values.ddp_backend)  # transformers leaves the timeout out on a CPU


def before_trl(arguments: Sequence[str], prog: str, declared: Sequence[tuple[str, ...]], config: str) -> list[str]:
    """Answer `--help`, and check a command line without a recipe, before TRL is imported; returns the arguments.
    `declared` are dataclasses as for `print_declared`, `config` is TRL's class of training arguments, whose fields are
    keys too."""
    tokens, path, _ = split_arguments(arguments)
    names = {token[2:].partition("=")[0].replace("-", "_"): True for token in tokens if token.startswith("--")}
    if "help_all" in names:
        return ["--help"]
    more = (
        f"Every field of trl.{config}, ModelConfig, ScriptArguments and DatasetMixtureConfig is a key as well, such as "
        "--model_name_or_path, --dataset_name and --output_dir; --help-all lists them."
    )
    print_declared(arguments, prog, declared, more)
    missing = "" if path is not None else _missing(names)
    if missing and ("model_name_or_path" not in names or "dry_run" not in names):
        raise UserValueError(f"{missing} Give options, or a recipe with --config FILE (see `{prog} --help`).")
    return list(arguments)


def load_rows(recipe: TrainingRecipe, split: str) -> Rows:
    """Load one split of `dataset_name` (file, folder or hub id), or of TRL's list `datasets`. ValueError for no data
    set, two, or no such split; FileNotFoundError for a local file that does not exist."""
    script, mixture, what = recipe.script, recipe.mixture, "training data"
    if bool(script.dataset_name) == bool(mixture.datasets):
        raise UserValueError(_DATA.format("both" if script.dataset_name else "neither"))
    if script.dataset_name is not None:
        only = "train" if text_suffix(script.dataset_name) in READERS else script.dataset_train_split
        splits = read_splits(script.dataset_name, only, script.dataset_config, script.dataset_streaming, what)
    else:
        import trl

        local = [_local(entry, mixture.streaming, what) for entry in mixture.datasets]
        with reading(", ".join(str(entry.path) for entry in mixture.datasets)):
            splits = trl.get_dataset(dataclasses.replace(mixture, datasets=local))
    return split_of(splits, split, "the data")


def load_evaluation(recipe: TrainingRecipe) -> Rows | None:
    """The evaluation split; None where the recipe does not evaluate."""
    return load_rows(recipe, recipe.script.dataset_test_split) if recipe.training.eval_strategy != "no" else None


def first_rows(rows: Rows, count: int) -> list[dict[str, Any]]:
    """Up to `count` rows from the start, of a data set in memory or a stream."""
    return list(islice(iter(rows), count))


def first_row(rows: Rows) -> dict[str, Any]:
    """The row by which TRL decides the kind of the data. ValueError: no rows."""
    for row in first_rows(rows, 1):
        return row
    raise UserValueError("the training data has no rows.")


def _local(entry: Any, streaming: bool, what: str) -> Any:
    """An entry of `datasets` with checked data files; one whose path is a data file becomes its reader and the file."""
    given = entry.data_files or ()
    for file in [given] if isinstance(given, str) else given:
        if isinstance(file, str) and text_suffix(file) in READERS and Path(file).is_file():
            check_data_file(file, streaming, what)
    if text_suffix(entry.path) not in READERS or text_suffix(entry.path) == ".tsv":
        return entry
    place = check_data_file(entry.path, streaming, what)
    return dataclasses.replace(entry, path=READERS[text_suffix(place)], data_files=str(place))


def _missing(values: Mapping[str, Any]) -> str:
    words = [] if values.get("model_name_or_path") else ["a recipe needs 'model_name_or_path': a folder or a hub id."]
    if not values.get("dataset_name") and not values.get("datasets"):
        words.append(_DATA.format("neither"))
    return " ".join(words)


def _without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that may be written to disk and pushed to a hub: below the top level, secrets become None."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: None if str(name).endswith(_SECRET_WORDS) else cleaned(one) for name, one in value.items()}
        return [cleaned(one) for one in value] if isinstance(value, list | tuple) else value

    return {name: cleaned(value) for name, value in settings.items()}
