"""Commands under the files of configs/: their inputs on disk, and launches by a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from looping_model import CIRCLE, ORDINARY, WORDS, looping_sae

from benchmarks.equality import CASES, Case, build_world, write_recipe

HERE = Path(__file__).resolve().parent
SAE = {
    "texts": "texts", "layers": [0], "width": 96, "k": 4, "steps": 6, "batch_tokens": 32, "context_length": 16,
    "block_tokens": 96, "forward_tokens": 64, "buffer_dtype": "float32", "calibration_tokens": 64,
    "held_out_documents": 2, "log_every": 2, "device": "cpu",
}  # fmt: skip


class Inputs:
    """A folder with a model, data and features for each command, and the command lines that read them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        build_world(folder)
        looping_sae(0).save(folder / "saes" / "layer0.sae.safetensors")
        (folder / "texts").mkdir()
        for language, ids in (("en", ORDINARY), ("zh", CIRCLE)):
            lines = [" ".join(WORDS[ids[(row + i) % len(ids)]] for i in range(24)) for row in range(12)]
            (folder / "texts" / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def arguments(self, command: str, name: str, processes: int, **changes: Any) -> list[str]:
        """The words after `qscope`, with an output folder of this name."""
        output = self.folder / name
        output.mkdir()
        if command in ("sft", "grpo"):
            case = Case("sft") if command == "sft" else CASES["seeded"]
            return [
                command,
                "--config",
                str(write_recipe(self.folder, output, case, processes, max_steps=2, **changes)),
            ]
        common = ["--model", str(self.folder / "grpo"), "--texts", str(self.folder / "texts"), "--output", str(output)]
        if command == "features find":
            own = ["--sae", str(self.folder / "saes"), "--layers", "0", "--top", "2"]
            return ["features", "find", *common, *own, "--device", "cpu"]
        recipe = output / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({key: value for key, value in SAE.items() if key != "texts"} | changes))
        return ["sae", "train", "--config", str(recipe), *common]


def job(config: str | None, arguments: list[str], *flags: str, **more: Any) -> dict[str, Any]:
    """A launch of two processes; `more` as for `benchmarks.launching.launch`."""
    return {"config": config, "arguments": arguments, "flags": ["--num_processes", "2", *flags], **more}


def run_jobs(folder: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each launch left behind; an error of any of them is shown."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "QSCOPE_QUIET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, str(HERE / "launch_worker.py"), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    launched: dict[str, dict[str, Any]] = json.loads((folder / "launched.json").read_text())
    for name, one in launched.items():
        assert not any(one["status"]), f"{name}: {one['output'][-6000:]}"
    return launched


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The steps of a training in this output folder."""
    log = json.loads((folder / "out" / "summary.json").read_text())["results"]["log"]
    return [entry for entry in log if "loss" in entry]
