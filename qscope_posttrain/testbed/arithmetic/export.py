"""The arithmetic testbed as files that `qscope grpo`, `qscope steer` and `qscope evaluate repetition` read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qscope_posttrain.testbed.arithmetic.experiment import ArithmeticExperiment
from qscope_posttrain.testbed.arithmetic.task import Problem, draw_problems
from qscope_posttrain.testbed.language_model import save_model

_TRAINING_SEED = 51
_PROMPTS_SEED = 52
_PROMPTS = 1000


def export_arithmetic(experiment: ArithmeticExperiment, folder: Path) -> dict[str, Path]:
    """Write the start model and what belongs to it, and return where it lies.

    `model/` (with tokenizer), `sae/layer{n}.sae.pt`, `features.safetensors` (with the steering that was chosen),
    `rl.jsonl` (prompt, answer; problems that training may show), `prompts.jsonl` (the same, held out).
    """
    config, model = experiment.config, experiment.language_model
    places = {
        "model": folder / "model",
        "sae": folder / "sae",
        "features": folder / "features.safetensors",
        "rl": folder / "rl.jsonl",
        "prompts": folder / "prompts.jsonl",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model.model, model.tokenizer, places["model"])
    places["sae"].mkdir(exist_ok=True)
    for file in sorted(experiment.saes.folder.glob("layer*")):
        shutil.copyfile(file, places["sae"] / file.name)
    shutil.copyfile(experiment.features.path(), places["features"])
    prompts = config.updates * config.prompts_per_update
    _write(places["rl"], draw_problems(prompts, config.operations, _TRAINING_SEED, held_out=False))
    _write(places["prompts"], draw_problems(_PROMPTS, config.operations, _PROMPTS_SEED, held_out=True))
    return places


def _write(path: Path, problems: Sequence[Problem]) -> None:
    rows: list[dict[str, Any]] = [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
