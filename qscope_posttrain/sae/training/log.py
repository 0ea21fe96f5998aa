"""The log of a training of SAEs: a JSONL file, trackers of accelerate, and a note on the progress bar."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.distributed import is_main_process
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import read_lines
from qscope_posttrain.report.summary import to_json, write_text
from qscope_posttrain.sae.training.update import UpdateMetrics

FILE_NAME = "metrics.jsonl"


class TrainingLog:
    """Means over the updates since the last record. Only rank 0 writes."""

    def __init__(self, folder: Path, report_to: Sequence[str], settings: Mapping[str, Any], done: int) -> None:
        """Records after update `done` belong to a run that was killed, and are removed from the file."""
        self.path = folder / FILE_NAME
        self.note = ""
        self.records = [record for record in _read(self.path) if record["step"] <= done] if done else []
        self._sums: dict[int, Tensor] = {}
        """Layer -> [2, metrics]: sums of the known values and their number"""
        self._accelerator = None
        if report_to:
            from accelerate import Accelerator

            plain = {key: v if isinstance(v, int | float | str | bool) else str(v) for key, v in settings.items()}
            self._accelerator = Accelerator(log_with=list(report_to), project_dir=str(folder))
            self._accelerator.init_trackers("qscope-sae", config=plain)
        if is_main_process():
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))

    def add(self, layer: int, metrics: UpdateMetrics) -> None:
        """Add one update of one layer, without waiting for the device."""
        values = torch.stack([value.float() for value in vars(metrics).values()])
        known = ~values.isnan()
        row = torch.stack([torch.where(known, values, 0.0), known.float()])
        self._sums[layer] = self._sums[layer] + row if layer in self._sums else row

    def record(self, step: int, **facts: Any) -> None:
        """Write the means as the record of update `step`, with further facts.

        Raises:
            ValueError: the loss is no longer finite.
        """
        layers: dict[str, dict[str, float | None]] = {}
        for layer, (sums, counts) in self._sums.items():
            layers[str(layer)] = dict(zip(UpdateMetrics.__dataclass_fields__, (sums / counts).tolist(), strict=True))
        self._sums = {}
        diverged = [layer for layer, means in layers.items() if not math.isfinite(means["fvu"] or 0.0)]
        if diverged:
            raise UserValueError(
                f"the training of layer {', '.join(diverged)} has diverged by update {step}: lower learning_rate, or "
                "lengthen warmup_steps. The last checkpoint is from before."
            )
        self._write({"step": step, **facts, "layers": layers})
        mean = sum(means["fvu"] or 0.0 for means in layers.values()) / max(len(layers), 1)
        self.note = f"unexplained variance {mean:.3f}"

    def evaluation(self, step: int, quality: Mapping[int, Mapping[str, Any]]) -> None:
        """Write the measurement on held-out text after update `step`."""
        self._write({"step": step, "held_out": {str(layer): dict(figures) for layer, figures in quality.items()}})

    def close(self) -> None:
        """Let the trackers write their buffers."""
        for tracker in self._accelerator.trackers if self._accelerator is not None else ():
            tracker.finish()

    def _write(self, record: dict[str, Any]) -> None:
        record = to_json(record)
        self.records.append(record)
        if is_main_process():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self._accelerator is not None:
            self._accelerator.log(_flat(record), step=record["step"])


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """`layers.3.fvu` becomes `layer3/fvu`; only numbers are kept."""
    flat = {key: value for key, value in record.items() if key != "step"}
    for part, prefix in (("layers", ""), ("held_out", "held_out_")):
        for layer, figures in record.get(part, {}).items():
            flat |= {f"layer{layer}/{prefix}{key}": value for key, value in figures.items()}
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run, without a last line that was cut off."""
    records: list[dict[str, Any]] = []
    for line in read_lines(path) if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
