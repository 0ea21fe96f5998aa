"""A tiny world on disk, as a user would have it: model folder, SAE files, texts, training data, prompts, features."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.launching import ON_A_CPU
from qscope_posttrain.cli.main import main
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

LAYERS = (2, 3)
ROWS_PER_LANGUAGE = 4


@dataclass(frozen=True)
class World:
    """Paths of the inputs of commands."""

    folder: Path

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def saes(self) -> str:
        return str(self.folder / "saes")

    @property
    def texts(self) -> str:
        return str(self.folder / "texts")

    @property
    def data(self) -> str:
        return str(self.folder / "train.jsonl")

    @property
    def prompts(self) -> str:
        return str(self.folder / "prompts.jsonl")

    @property
    def features(self) -> str:
        return str(self.folder / "found" / "features.safetensors")

    def recipe(self, path: Path, **changes) -> str:
        """Write a recipe that trains two steps on the CPU, with changes; None leaves a key out."""
        keys = {
            "model_name_or_path": self.model,
            "dataset_name": self.data,
            "features": self.features,
            "sasft_target": "zh",
            "sasft_weight": 0.01,
            "output_dir": str(path.parent / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_length": 128,
            **ON_A_CPU,
        }
        keys |= changes
        path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
        return str(path)


@pytest.fixture(scope="session")
def world(tmp_path_factory, make_model, tiny_tokenizer, texts) -> World:
    folder = tmp_path_factory.mktemp("world")
    make_model("qwen3").save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    for layer in LAYERS:
        _sae(layer).save(folder / "saes" / f"layer{layer}.sae.safetensors")
    (folder / "texts").mkdir()
    rows, prompts = [], []
    for language, lines in texts.items():
        (folder / "texts" / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows += [{"prompt": line[:10], "completion": line[10:], "language": language} for line in lines]
        if language != "zh":
            prompts += [{"prompt": line, "language": language} for line in lines[:2]]
    _write_jsonl(folder / "train.jsonl", rows)
    _write_jsonl(folder / "prompts.jsonl", prompts)
    found = World(folder)
    arguments = ["features", "find", "--model", found.model, "--texts", found.texts, "--sae", found.saes]
    arguments += ["--layers", "2-3", "--top", "2", "--target", "zh", "--output", str(folder / "found")]
    assert main(arguments) == 0
    return found


def _sae(layer: int, d_model: int = 64, d_sae: int = 128) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(layer)
    decoder = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=generator), dim=1)
    return SparseAutoencoder(
        decoder.clone(), torch.zeros(d_sae), decoder, torch.zeros(d_model), TopK(8, "relu_after"), layer
    )


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
