"""Checkpoints of a training of SAEs: weights, optimiser and counters, and where in the text it stands; no activations.

A checkpoint is a folder `step-<n>` with a safetensors file a layer and `state.json`. It appears under its name when it
is complete, so that a run that is killed at any moment leaves whole checkpoints only.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.training.config import SAETrainingConfig
from qscope_posttrain.sae.training.text_stream import StreamPosition
from qscope_posttrain.sae.training.update import LayerTraining

FORMAT = "qscope_posttrain.sae_training"
STATE = "state.json"


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands, beside the tensors of its layers."""

    step: int
    """Updates that are done"""
    block: int
    """Number of the block of activations from which the next update draws"""
    update: int
    """Updates drawn from that block"""
    position: StreamPosition
    """Where that block begins in the text"""
    medians: dict[int, float]
    """Median norm of each layer"""
    left_out: dict[int, int]
    """Norm outliers of each layer in the blocks before"""
    seconds: float
    """Time that the training has taken"""


def write_checkpoint(
    folder: Path, state: TrainingState, trainings: Mapping[int, LayerTraining], settings: Mapping[str, Any], keep: int
) -> Path:
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
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most updates, if there is one."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def read_checkpoint(
    place: Path, settings: Mapping[str, Any], config: SAETrainingConfig, devices: Mapping[int, torch.device]
) -> tuple[TrainingState, dict[int, LayerTraining]]:
    """What `write_checkpoint` has written.

    Raises:
        ValueError: a damaged checkpoint, or one of other settings; the message names what differs.
    """
    try:
        content = json.loads((place / STATE).read_text(encoding="utf-8"))
        written = content["settings"]
        state = TrainingState(
            step=int(content["step"]),
            block=int(content["block"]),
            update=int(content["update"]),
            position=StreamPosition(**content["position"]),
            medians={int(layer): float(value) for layer, value in content["medians"].items()},
            left_out={int(layer): int(value) for layer, value in content["left_out"].items()},
            seconds=float(content["seconds"]),
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserValueError(
            f"{place} is no checkpoint of a training of SAEs, or damaged ({error}): delete it"
        ) from error
    _check_settings(place, written, json.loads(json.dumps(dict(settings))))
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


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(place for place in folder.glob("step-*") if (place / STATE).is_file())


def _check_settings(place: Path, written: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    different = [
        f"{name} was {written.get(name)!r} and is {asked.get(name)!r}"
        for name in sorted({*written, *asked})
        if written.get(name) != asked.get(name)
    ]
    if different:
        raise UserValueError(
            f"{place} belongs to another training: {'; '.join(different)}. Go on with the same settings, choose "
            "another output folder, or start anew with resume: false."
        )
