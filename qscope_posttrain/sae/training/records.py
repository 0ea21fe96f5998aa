"""The files of a training of SAEs while it runs: checkpoints to resume from, and a log.

A checkpoint is a folder `step-<n>` with one safetensors file per layer (weights, optimizer, counters) and `state.json`,
which holds the position in the text; no activations. It gets its name when it is complete, so that a run that is killed
at any moment leaves only whole checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qscope_posttrain.distributed import is_main_process
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import read_lines
from qscope_posttrain.report.summary import to_json, write_text
from qscope_posttrain.sae.training.config import SAETrainingConfig
from qscope_posttrain.sae.training.text_stream import StreamPosition
from qscope_posttrain.sae.training.update import LayerTraining, UpdateMetrics

FORMAT = "qscope_posttrain.sae_training"
STATE = "state.json"
LOG = "metrics.jsonl"


@dataclass(frozen=True)
class TrainingState:
    """Progress of a training, without the tensors of its layers."""

    step: int  # Updates that are done
    block: int  # Number of the block of activations that the next update draws from
    update: int  # Updates drawn from that block
    position: StreamPosition  # Start of that block in the text
    medians: dict[int, float]  # Median norm of each layer
    left_out: dict[int, int]  # Norm outliers of each layer in the blocks before
    seconds: float  # Time that the training has taken


def write_checkpoint(
    folder: Path, state: TrainingState, trainings: Mapping[int, LayerTraining], settings: Mapping[str, Any], keep: int
) -> None:
    """Write `folder/step-<n>`, then delete all but the last `keep` checkpoints."""
    final = folder / f"step-{state.step:08d}"
    unfinished = folder / f".{final.name}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for layer, training in trainings.items():
        tensors = {name: value.detach().cpu().contiguous() for name, value in training.tensors().items()}
        save_file(tensors, str(unfinished / f"layer{layer}.safetensors"))
    content = {"format": FORMAT, "settings": dict(settings), **asdict(state)}
    (unfinished / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for file in unfinished.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def read_checkpoint(
    place: Path, settings: Mapping[str, Any], config: SAETrainingConfig, devices: Mapping[int, torch.device]
) -> tuple[TrainingState, dict[int, LayerTraining]]:
    """Read a checkpoint of `write_checkpoint`; `devices` has the device of each layer.

    Raises:
        ValueError: a damaged checkpoint, or one of other settings; the message names the differences.
    """
    try:
        content = json.loads((place / STATE).read_text(encoding="utf-8"))
        written, asked = content["settings"], json.loads(json.dumps(dict(settings)))
        different = [
            f"{name} was {written.get(name)!r} and is {asked.get(name)!r}"
            for name in sorted({*written, *asked})
            if written.get(name) != asked.get(name)
        ]
        state = TrainingState(
            **{name: int(content[name]) for name in ("step", "block", "update")},
            position=StreamPosition(**content["position"]),
            medians={int(layer): float(value) for layer, value in content["medians"].items()},
            left_out={int(layer): int(value) for layer, value in content["left_out"].items()},
            seconds=float(content["seconds"]),
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserValueError(
            f"{place} is not a checkpoint of a training of SAEs, or is damaged ({error}): delete it"
        ) from error
    if different:
        raise UserValueError(
            f"{place} belongs to another training: {'; '.join(different)}. Resume with the same settings, choose "
            "another output folder, or start again with resume: false."
        )
    trainings = {}
    for layer, device in devices.items():
        try:
            tensors = load_file(str(place / f"layer{layer}.safetensors"))
            trainings[layer] = LayerTraining.resumed(layer, tensors, config, device)
        except (OSError, SafetensorError, KeyError) as error:
            raise UserValueError(
                f"{place}: layer {layer} is missing or damaged ({error}): delete the checkpoint"
            ) from error
    return state, trainings


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, that with the most updates last."""
    return sorted(place for place in folder.glob("step-*") if (place / STATE).is_file())


class TrainingLog:
    """Means over the updates since the last record. Only rank 0 writes."""

    def __init__(self, folder: Path, report_to: Sequence[str], settings: Mapping[str, Any], done: int) -> None:
        """Records after update `done` belong to a run that was killed, and are removed from the file."""
        self.path = folder / LOG
        self.note = ""
        self.records = [record for record in _read(self.path) if record["step"] <= done] if done else []
        self._sums: dict[int, Tensor] = {}  # Layer -> [2, metrics]: sums of the known values and their number
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
