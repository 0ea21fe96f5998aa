"""What a training of SAEs reports while it runs: a JSONL file, the usual trackers, a few words on the progress bar."""

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
    """Means over the updates since the last record, one record every few updates. Only rank 0 writes."""

    def __init__(
        self, folder: Path, layers: Sequence[int], report_to: Sequence[str], settings: Mapping[str, Any], done: int
    ) -> None:
        """Records after update `done` are those of a run that was killed: they are taken out of the file."""
        self.path = folder / FILE_NAME
        self.layers = tuple(layers)
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}
        self._names: tuple[str, ...] = ()
        self.shown = ""
        self.records = [record for record in _read(self.path) if record["step"] <= done] if done else []
        self._accelerator = _trackers(folder, report_to, settings)
        if is_main_process():
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))

    def add(self, layer: int, metrics: UpdateMetrics) -> None:
        """Add one update of one layer; waits for no device."""
        named = metrics.tensors()
        self._names = tuple(named)
        values = torch.stack([value.float() for value in named.values()])
        known = ~values.isnan()
        values = torch.where(known, values, 0.0)
        self._sums[layer] = self._sums[layer] + values if layer in self._sums else values
        self._counts[layer] = self._counts[layer] + known if layer in self._counts else known.long()

    def record(self, step: int, **facts: Any) -> None:
        """Write the means as the record of update `step`, with further facts.

        Raises:
            ValueError: the loss is not finite any more.
        """
        layers: dict[str, dict[str, float | None]] = {}
        for layer, sums in self._sums.items():
            means = (sums / self._counts[layer]).tolist()
            layers[str(layer)] = dict(zip(self._names, means, strict=True))
        self._sums, self._counts = {}, {}
        diverged = [layer for layer, means in layers.items() if not math.isfinite(means["fvu"] or 0.0)]
        if diverged:
            raise UserValueError(
                f"the training of layer {', '.join(diverged)} has diverged by update {step}: lower learning_rate, or "
                "lengthen warmup_steps. The last checkpoint is from before."
            )
        self._write({"step": step, **facts, "layers": layers})
        mean = sum(means["fvu"] or 0.0 for means in layers.values()) / max(len(layers), 1)
        self.shown = f"unexplained variance {mean:.3f}"

    def evaluation(self, step: int, quality: Mapping[int, Mapping[str, Any]]) -> None:
        """Write what was measured on held-out text after update `step`."""
        self._write({"step": step, "held_out": {str(layer): dict(figures) for layer, figures in quality.items()}})

    def close(self) -> None:
        """Let the trackers write what they still hold."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def _write(self, record: dict[str, Any]) -> None:
        record = to_json(record)
        self.records.append(record)
        if is_main_process():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self._accelerator is not None:
            self._accelerator.log(_flat(record), step=record["step"])


def _trackers(folder: Path, report_to: Sequence[str], settings: Mapping[str, Any]) -> Any:
    if not report_to:
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(report_to), project_dir=str(folder))
    plain = {
        key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in settings.items()
    }
    accelerator.init_trackers("qscope-sae", config=plain)
    return accelerator


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """`layers.3.fvu` becomes `layer3/fvu`; what is not a number is left out."""
    flat = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
    for part, prefix in (("layers", ""), ("held_out", "held_out_")):
        for layer, figures in record.get(part, {}).items():
            named = {f"layer{layer}/{prefix}{key}": value for key, value in figures.items()}
            flat |= {key: value for key, value in named.items() if isinstance(value, int | float)}
    return flat


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    records = []
    for line in read_lines(path):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
