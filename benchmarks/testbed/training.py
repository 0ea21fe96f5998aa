"""Trainers of both tasks: the arguments that they share, runs without printed lines, and the time of a step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from benchmarks.testbed.settings import TaskSettings


def common_arguments(config: TaskSettings, seed: int, folder: str) -> dict[str, Any]:
    """Return arguments that are the same for both tasks: fp32, no weight decay, nothing saved or printed."""
    return {
        "output_dir": folder,
        "adam_beta2": 0.98,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": seed,
        "use_cpu": config.torch_device() == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


@contextmanager
def renamed_argument_ignored() -> Iterator[None]:
    """Ignore the warning about an argument that transformers 5.23 renames and 5.17 knows by its old name only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


def train_quietly(trainer: Any) -> tuple[tuple[Mapping[str, Any], ...], float]:
    """Train without a printed line per step; return the log, one entry per step, and the seconds it took."""
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    return tuple(entry for entry in trainer.state.log_history if "loss" in entry), seconds


class StepClock(TrainerCallback):
    """Measures the wall time of every optimizer step."""

    def __init__(self) -> None:
        self._began = 0.0
        self._times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._times.append(time.perf_counter() - self._began)

    def median(self) -> float:
        """Return the median in seconds; 0 before the first step."""
        ordered = sorted(self._times)
        return ordered[len(ordered) // 2] if ordered else 0.0
