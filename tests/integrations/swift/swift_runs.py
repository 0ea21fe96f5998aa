"""Runs of ms-swift on a tiny model: in this process, as `swift sft` calls it, or by its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers.modeling_utils
import yaml
from free_port import free_port
from integrations.frameworks import SASFT, conversations, launched, rows_in_their_languages
from integrations.reference import LANGUAGES, case_model, make_features

import qscope_posttrain

HERE = Path(__file__).resolve().parent
PLUGIN = Path(qscope_posttrain.__file__).parent / "integrations" / "swift.py"
KEEP = HERE / "keep_gradients.py"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_settings(path: Path, settings: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    return path


@dataclass
class Run:
    """What a run left behind."""

    folder: Path
    keep: Path

    def rank(self, rank: int = 0, step: int = 0) -> dict[str, Any]:
        kept: dict[str, Any] = torch.load(self.keep / f"rank_{rank}_step_{step}.pt", weights_only=False)
        return kept

    @property
    def begun(self) -> bool:
        """Whether a step was taken."""
        return any(self.keep.iterdir())

    @property
    def logs(self) -> list[dict[str, Any]]:
        file = next(self.folder.rglob("logging.jsonl"))
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    @property
    def checkpoint(self) -> Path:
        return next(self.folder.rglob("checkpoint-1"))


class Workplace:
    """A folder with model, tokenizer, features, data and settings, and the runs in it."""

    def __init__(self, folder: Path, make_model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]]) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.tokenizer = tokenizer
        self.texts = texts
        self.count = 0
        self._model = case_model(make_model)
        self._model.save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        self.features = self.features_of(*LANGUAGES)
        write_rows(folder / "data.jsonl", self.conversations())

    def features_of(self, *languages: str) -> Path:
        """The file of a FeatureSet of the model that knows these languages."""
        file = self.folder / f"features_{'_'.join(languages)}.safetensors"
        make_features(self._model, languages=languages).save(file)
        return file

    def conversations(self, column: str | None = "channel") -> list[dict[str, Any]]:
        """Eight rows in three languages, in turn; the prompts are in another one than the responses."""
        return conversations(self.texts, column, prompt_length=18)

    def rows_of(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The documents of micro-batches of ms-swift, in the language of their text, which no column has told."""
        return rows_in_their_languages(batches, self.tokenizer, self.texts)

    def command(self, run: Run, options: Mapping[str, Any]) -> list[str]:
        """The arguments of `swift sft`: one step of eight rows at learning rate 0, without clipping; `options` win."""
        settings: dict[str, Any] = {
            "model": self.model,
            "model_type": "qwen3",
            "template": "qwen3",
            "dataset": self.folder / "data.jsonl",
            "external_plugins": [PLUGIN, KEEP],
            "callbacks": ["qscope_sasft", "keep_gradients"],
            "output_dir": run.folder,
            "tuner_type": "full",
            "torch_dtype": "float32",
            "bf16": "false",
            "attn_impl": "sdpa",
            "use_cpu": "true",
            "max_length": 256,
            "max_steps": 1,
            "learning_rate": 0,
            "max_grad_norm": 0,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": "false",
            "split_dataset_ratio": 0,
            "dataset_num_proc": 1,
            "dataloader_num_workers": 0,
            "load_from_cache_file": "false",
            "check_model": "false",
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
        }
        return spelled(settings | dict(options))

    def settings(self, values: Mapping[str, Any] | None = None, **changes: Any) -> Path:
        """A settings file; the features are the workplace's where the method needs some."""
        chosen = dict(SASFT if values is None else values) | changes
        if chosen.get("method") == "sasft":
            chosen.setdefault("features", str(self.features))
        self.count += 1
        return write_settings(self.folder / f"settings_{self.count}.yaml", chosen)

    def new_run(self) -> Run:
        self.count += 1
        run = Run(self.folder / f"run_{self.count}", self.folder / f"kept_{self.count}")
        run.keep.mkdir()
        return run

    def environment(self, run: Run, settings: Path | None) -> dict[str, str]:
        found = {"KEEP_GRADIENTS": str(run.keep)}
        return found if settings is None else found | {"QSCOPE_SETTINGS": str(settings)}

    def train(self, options: Mapping[str, Any] | None = None, settings: Path | None = None, main: Any = None) -> Run:
        """One training in this process, by what `swift sft` calls."""
        from swift.pipelines import sft_main

        run = self.new_run()
        environment = {name: value for name, value in os.environ.items() if name != "QSCOPE_SETTINGS"}
        try:
            with mock.patch.dict(os.environ, environment | self.environment(run, settings), clear=True):
                (main or sft_main)(self.command(run, options or {}))
        finally:
            # ms-swift replaces this function for the whole process, with the kind of checkpointing of its first run.
            original = vars(torch.utils.checkpoint).pop("_old_checkpoint", None)
            if original is not None:
                torch.utils.checkpoint.checkpoint = transformers.modeling_utils.checkpoint = original
        return run

    def by_command(
        self,
        options: Mapping[str, Any],
        settings: Path | None,
        processes: int | None = None,
        recipe: Path | None = None,
    ) -> tuple[Run, subprocess.CompletedProcess[str]]:
        """`swift sft ...` as a user types it; with a recipe, `options` override its keys."""
        run = self.new_run()
        environment = {name: value for name, value in os.environ.items() if name != "QSCOPE_SETTINGS"}
        environment |= self.environment(run, settings) | {"PYTHONPATH": str(HERE.parents[2])}
        if processes is not None:
            environment |= {"NPROC_PER_NODE": str(processes), "MASTER_PORT": str(free_port())}
        given = (
            self.command(run, options)
            if recipe is None
            else [str(recipe), *spelled({**options, "output_dir": run.folder})]
        )
        words = [str(Path(sys.executable).parent / "swift"), "sft", *given]
        return run, launched(words, environment, self.folder)


def spelled(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line; None leaves one out."""
    words: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [] if value is None else [f"--{name}", *map(str, values)]
    return words
