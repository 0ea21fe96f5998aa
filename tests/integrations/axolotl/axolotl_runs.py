"""Runs of axolotl on a tiny model: in this process, by what `axolotl train` calls, or by its command line."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from free_port import free_port
from integrations.frameworks import SASFT, conversations, launched, rows_in_their_languages
from integrations.reference import LANGUAGES, case_model, make_features

HERE = Path(__file__).resolve().parent
PLUGIN = "qscope_posttrain.integrations.axolotl.SASFTPlugin"
KEEP = "axolotl_keep.KeepPlugin"
PACKED: dict[str, Any] = {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 160}
"""Of the eight conversations the packer makes four rows of two, since every one is longer than a third of a row and at
most half as long; `Workplace` checks it."""


@dataclass
class Run:
    """What a run left behind."""

    folder: Path

    def step(self, step: int = 0, rank: int = 0) -> dict[str, Any]:
        kept: dict[str, Any] = torch.load(self.folder / "kept" / f"rank_{rank}_step_{step}.pt", weights_only=False)
        return kept

    @property
    def begun(self) -> bool:
        """Whether a step was taken."""
        return any((self.folder / "kept").glob("*")) if (self.folder / "kept").is_dir() else False

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = self._end["weights"]
        return found

    @property
    def logs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._end["logs"]
        return found

    @property
    def _end(self) -> dict[str, Any]:
        kept: dict[str, Any] = torch.load(self.folder / "kept" / "rank_0_end.pt", weights_only=False)
        return kept


class Workplace:
    """A folder with model, tokenizer, features and data, and the runs in it."""

    def __init__(self, folder: Path, make_model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]]) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.tokenizer = tokenizer
        self.texts = texts
        self.count = 0
        self.make_model = make_model
        case_model(make_model).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        self.features = self.features_of(*LANGUAGES)
        rows = self.conversations()
        self.data = self.write(rows)
        for row in rows:
            length = len(tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"])
            assert PACKED["sequence_len"] < 3 * length <= 1.5 * PACKED["sequence_len"]

    def features_of(self, *languages: str) -> Path:
        path = self.folder / f"features_{'_'.join(languages)}.safetensors"
        make_features(case_model(self.make_model), languages=languages).save(path)
        return path

    def conversations(self, column: str | None = "language") -> list[dict[str, Any]]:
        """Eight rows in three languages, in turn; the prompts are in another one than the responses."""
        return conversations(self.texts, column, prompt_length=30)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> Path:
        self.count += 1
        path = self.folder / f"data_{self.count}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    def rows_of(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The documents of micro-batches, in the language of their text."""
        return rows_in_their_languages(batches, self.tokenizer, self.texts)

    def config(self, block: Mapping[str, Any] | None = SASFT, **changes: Any) -> dict[str, Any]:
        """One step of eight rows at learning rate 0, without clipping; `changes` win, None removes a key."""
        self.count += 1
        chosen: dict[str, Any] = {
            "base_model": str(self.model),
            "plugins": [KEEP] if block is None else [PLUGIN, KEEP],
            "qscope": None if block is None else dict(block),
            "datasets": [{"path": str(self.data), "ds_type": "json", "type": "chat_template"}],
            "chat_template": "tokenizer_default",
            "dataset_prepared_path": str(self.folder / f"prepared_{self.count}"),
            "output_dir": str(self.folder / f"run_{self.count}"),
            "sequence_len": 1024,
            "sample_packing": False,
            "eval_sample_packing": False,
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_steps": 1,
            "num_epochs": 1,
            "optimizer": "adamw_torch",
            "learning_rate": 0.0,
            "lr_scheduler": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "attn_implementation": "sdpa",
            "gradient_checkpointing": False,
            "lora_mlp_kernel": False,
            "lora_qkv_kernel": False,
            "lora_o_kernel": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "val_set_size": 0.0,
            "device": "cpu",
            "seed": 0,
            "dataset_num_proc": 1,
        }
        if chosen["qscope"] is not None and chosen["qscope"].get("method") == "sasft":
            chosen["qscope"].setdefault("features", str(self.features))
        return {key: value for key, value in {**chosen, **changes}.items() if value is not None}

    def write_config(self, config: Mapping[str, Any]) -> Path:
        path = Path(f"{config['output_dir']}.yml")
        path.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
        return path

    def train(self, block: Mapping[str, Any] | None = SASFT, **changes: Any) -> Run:
        """One training in this process, by what `axolotl train` calls."""
        return self.train_config(self.config(block, **changes))

    def train_config(self, config: Mapping[str, Any]) -> Run:
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.cli.train import do_train

        do_train(self.load(config), TrainerCliArgs())
        return Run(Path(config["output_dir"]))

    def evaluate(self, config: Mapping[str, Any]) -> str:
        """One evaluation in this process, by what `axolotl evaluate` calls; returns the table that it writes."""
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.cli.evaluate import do_evaluate

        do_evaluate(self.load(config), TrainerCliArgs())
        return (Path(config["output_dir"]) / "eval_summary.csv").read_text(encoding="utf-8")

    def load(self, config: Mapping[str, Any]) -> Any:
        """The configuration as axolotl reads and checks it."""
        from axolotl.cli.config import load_cfg
        from axolotl.integrations.base import PluginManager

        gc.freeze()  # axolotl collects garbage several times a run, and the objects of pytest and of axolotl are many
        PluginManager.get_instance().plugins.clear()  # those of an earlier run; a process of axolotl has one
        return load_cfg(str(self.write_config(config)))

    def by_command(self, config: Mapping[str, Any], processes: int = 1) -> tuple[Run, subprocess.CompletedProcess[str]]:
        """`axolotl train config.yml` as a user types it."""
        path = ":".join([str(HERE), str(HERE.parents[1]), str(HERE.parents[2])])
        environment = os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"} | quiet()
        programs = Path(sys.executable).parent
        environment["PATH"] = f"{programs}:{environment['PATH']}"  # where axolotl looks for its launcher
        words = [str(programs / "axolotl"), "train", str(self.write_config(config))]
        if processes > 1:
            port = str(free_port())
            words += ["--launcher", "torchrun", "--", f"--nproc_per_node={processes}", f"--master_port={port}"]
        else:
            words += ["--launcher", "python"]
        return Run(Path(config["output_dir"])), launched(words, environment, self.folder)


def quiet() -> dict[str, str]:
    """Settings for axolotl not to call home, nor to look for a GPU."""
    return {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
