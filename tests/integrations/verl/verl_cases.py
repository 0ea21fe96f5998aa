"""verl's own SFT trainer and FSDP engine on the CPU, with small cases.

Import this before anything of verl: it tells verl's platform layer, which knows accelerators only, that there is a CPU.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")  # verl's name for "take the engine that is registered for GPUs"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd
import torch
import torch.distributed.fsdp._init_utils as fsdp_init
from conftest import TEXTS, build_model
from hydra import compose, initialize_config_module
from integrations.reference import LANGUAGES, case_model, make_features, reference_gradients, row_penalty, with_lora
from verl.plugin.platform import set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.sft.config import PAPER


def _nothing(*args: Any, **options: Any) -> int:
    return 0


class PlatformCPU(PlatformCUDA):
    """All that verl asks about a device, for one without memory to watch."""

    device_name = "cpu"
    device_module = types.SimpleNamespace(
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), _nothing
        ),
        **dict.fromkeys(("set_device", "empty_cache", "synchronize", "ipc_collect"), _nothing),
        mem_get_info=lambda: (0, 0),
        get_device_name=lambda: "cpu",
        is_available=lambda: False,
    )

    def current_device(self) -> str:
        return "cpu"

    def communication_backend_name(self) -> str:
        return "gloo"


set_platform(PlatformCPU())
# The old FSDP synchronizes initial weights on GPUs only, and refuses. One process has nothing to synchronize.
fsdp_init._check_module_states_for_sync_module_states = _nothing

from verl.trainer.sft_trainer import SFTTrainer  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402

FP32 = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
WEIGHT = 20 * PAPER["weight"]  # the gradient without the penalty is then far from the one with it
PENALTY = {**PAPER, "method": "sasft", "target": "zh", "weight": WEIGHT}
LANGUAGE_ROWS = (
    "data.custom_cls.path=pkg://qscope_posttrain.integrations.verl",
    "data.custom_cls.name=LanguageSFTDataset",
)
OF_ROWS = [LANGUAGES[i % len(LANGUAGES)] for i in range(8)]


def join_processes(folder: Path, rank: int = 0, processes: int = 1) -> None:
    """The process group that verl would make over NCCL."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'ranks'}", rank=rank, world_size=processes
    )


def make_world(folder: Path, tokenizer: Any) -> Path:
    """A model, an adapter, features and conversations of unequal length on disk."""
    model = case_model(build_model)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    make_features(model).save(folder / "features.safetensors")
    with_lora(model).save_pretrained(folder / "adapter")
    write_rows(folder / "train.parquet", OF_ROWS)
    return folder


def write_rows(path: Path, languages: list[str], **columns: list[Any]) -> None:
    """Conversations with answers in `languages`, and a column with them unless `columns` has others."""
    rows = []
    for i, language in enumerate(languages):
        prompt = " ".join(TEXTS["en"][0].split()[: i % 3 + 1])
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": TEXTS[language][i % 4][: 9 + 5 * i]},
        ]
        rows.append({"messages": turns})
    pd.DataFrame(rows).assign(**(columns or {"language": languages})).to_parquet(path)


def command_line(folder: Path, *overrides: str) -> list[str]:
    """One step on all rows in fp32, as verl's own config describes it but for this and `overrides`."""
    settings = [
        f"model.path={folder / 'model'}",
        f"data.train_files={folder / 'train.parquet'}",
        "data.train_batch_size=8",
        "data.micro_batch_size_per_gpu=8",
        "data.use_dynamic_bsz=False",
        "data.num_workers=0",
        "engine.strategy=fsdp2",
        "engine.use_orig_params=True",
        f"+engine.mixed_precision={FP32}",
        "+model.override_config.attn_implementation=sdpa",
        "model.enable_gradient_checkpointing=False",
        "optim.lr=0.0",
        "optim.weight_decay=0.0",
        "trainer.logger=[]",
        "trainer.total_epochs=1",
        "trainer.resume_mode=disable",
        "trainer.device=cpu",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        *LANGUAGE_ROWS,
    ]
    given = {setting.split("=")[0].lstrip("+") for setting in overrides}
    settings = [setting for setting in settings if setting.split("=")[0].lstrip("+") not in given]
    return [*settings, *overrides]


def make_trainer(folder: Path, *overrides: str) -> SFTTrainer:
    """verl's trainer with `command_line`."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return SFTTrainer(compose("sft_trainer_engine", overrides=command_line(folder, *overrides)))


def plain_rows(trainer: SFTTrainer) -> None:
    """Let a data set of ours give its rows to a trainer without a loss of ours."""
    trainer.train_dataset.attached = True


def fit(trainer: SFTTrainer, run: Any = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train, without saving; the gradients of the last step before clipping, and its metrics."""
    gradients: dict[str, torch.Tensor] = {}
    metrics: dict[str, Any] = {}
    step, batch = trainer.engine.optimizer_step, trainer.training_client.train_batch

    def optimizer_step() -> Any:
        for name, parameter in trainer.engine.module.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                gradients[name.replace("_fsdp_wrapped_module.", "")] = whole.clone()
        return step()

    def train_batch(data: Any) -> Any:
        output = batch(data)
        metrics.update(tensordict_utils.get(output, "metrics"))
        return output

    trainer.engine.optimizer_step, trainer.training_client.train_batch = optimizer_step, train_batch
    trainer.ckpt_handler.save_checkpoint = _nothing
    (run or trainer.fit)()
    return gradients, metrics


def tokenized(trainer: SFTTrainer, languages: list[str] | None = None) -> list[dict[str, Any]]:
    """verl's tokens and labels of each row, with its language as the test, not the package, knows it."""
    plain_rows(trainer)
    rows = []
    for i, language in enumerate(languages or OF_ROWS):
        row = trainer.train_dataset[i]
        labels = [
            token if flag else -100 for token, flag in zip(row["input_ids"].tolist(), row["loss_mask"], strict=True)
        ]
        rows.append({"input_ids": row["input_ids"].tolist(), "labels": labels, "language": language})
    return rows


def expected(folder: Path, rows: list[dict[str, Any]], weight: float, lora: bool) -> tuple[Any, float, float]:
    """Gradients, loss and penalty, written out row by row."""
    from peft import PeftModel

    model = case_model(build_model)
    if lora:
        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    features = FeatureSet.load(folder / "features.safetensors")
    return reference_gradients(model, rows, row_penalty(features), weight)
