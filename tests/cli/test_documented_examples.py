"""Every Python example of README.md and docs/ runs as it stands there, with a tiny model for the one that it names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import qscope_posttrain as qp

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}:{number}")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for number, block in enumerate(FENCE.findall(page.read_text(encoding="utf-8")), 1)
]
QUICK = 'max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True'


def shorter(completions, **kwargs):
    return [-float(len(completion)) for completion in completions]


def tokenized(row, tokenizer):
    ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("example", EXAMPLES)
def test_runs(example, world, small, tmp_path, monkeypatch):
    if "VLLMSampler" in example:
        pytest.skip("needs vLLM: tests/integrations/vllm/test_evaluate_vllm.py runs it")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for path in Path(world.texts).iterdir():
        (tmp_path / "texts" / path.name).write_text(path.read_text(encoding="utf-8") * 10, encoding="utf-8")
    loop = replace(
        small["features"].select(language="zh", layers=3, top=1),
        settings={"steering": {"layer": 3, "strength": 1.0, "window_start": [1, 2], "window_length": 4}},
    )
    (tmp_path / "repetition").mkdir()
    loop.save(tmp_path / "repetition")
    for pattern, text in {
        r"Qwen/Qwen3-1.7B(-Base)?": world.model,
        r"Qwen/SAE-[\w.-]+|qwen3-8b-base-64k-l0-50|folder/of/saes": world.saes,
        r'(?<=(?:oad|ack)\()\s*"runs/features"': f'"{world.folder / "found"}"',
        r"runs/repetition": str(tmp_path / "repetition"),
        r'SFTConfig\(\s*"out"': f'SFTConfig("out", per_device_train_batch_size=4, {QUICK}',
        r"from trl.rewards import accuracy_reward\n": "",
        r"accuracy_reward": "shorter",
        r'SteeredGRPOConfig\("out", num_generations=8, max_completion_length=4096': (
            'SteeredGRPOConfig("out", num_generations=4, max_completion_length=16, per_device_train_batch_size=4, '
            + QUICK
        ),
        r'vllm_mode="colocate"': 'vllm_mode="colocate", use_cpu=True, bf16=False',
        r"steps=300": "steps=2, batch_tokens=16",
        r"416": "41",
        r"max_length=2048": "max_length=128",
        r"layer=20|layer=27": "layer=3",
        r"layers=\[27\]|layers=\[20\]": "layers=[3]",
        r"\{27: ": "{3: ",
        r"\{6: sae\}": "{3: sae}",
        r"top=32": "top=2",
        r"=dataset,  # input_ids, labels": "=tokenized,  #",
    }.items():
        example = re.sub(pattern, text, example)
    exec(compile(example, "example", "exec"), dict(small))


@pytest.fixture
def small(world, texts):
    tokenizer = AutoTokenizer.from_pretrained(world.model, padding_side="left")
    x = torch.randn(64, 64)
    dataset = load_dataset("json", data_files=world.data, split="train")
    return {
        "dataset": dataset,
        "tokenized": dataset.map(lambda row: tokenized(row, tokenizer), remove_columns=["prompt", "completion"]),
        "model": AutoModelForCausalLM.from_pretrained(world.model),
        "tokenizer": tokenizer,
        "features": qp.FeatureSet.load(Path(world.features)),
        "sae": qp.SparseAutoencoder.load(world.saes, layer=3),
        "english": texts["en"],
        "chinese": texts["zh"],
        "texts": [*texts["en"], *texts["zh"]],
        "labels": [0] * len(texts["en"]) + [1] * len(texts["zh"]),
        "inputs": tokenizer(["The river", "She reads"], return_tensors="pt", padding=True) | {"max_new_tokens": 8},
        "direction": torch.randn(64),
        "mask": torch.tensor([True, False]),
        "x": x,
        "activations": x,
        "prompts": texts["en"][:2],
        "judge": lambda sample: float("a" in sample.response),
        "shorter": shorter,
    }
