"""Model folders that bring Python files: those run only on the user's word, in the dry run as in training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from qscope_posttrain.cli.training.sft import build_trainer, parse_recipe
from qscope_posttrain.cli.training.sft_checks import check_recipe
from qscope_posttrain.models.loading import load_config, load_tokenizer

CANARY = "QSCOPE_CODE_OF_A_MODEL"
CODE = f"""
import os
os.environ["{CANARY}"] = "1"
from transformers import Qwen3Config, Qwen3ForCausalLM
class HostileConfig(Qwen3Config):
    model_type = "hostile"
class Hostile(Qwen3ForCausalLM):
    config_class = HostileConfig
"""


@pytest.fixture
def model(tmp_path: Path, make_model, tiny_tokenizer, monkeypatch) -> Path:
    """A model whose own code has to run before it can be loaded."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / f"model_{tmp_path.name}"  # transformers keeps modules by the folder's name
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "hostile.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "hostile.HostileConfig", "AutoModelForCausalLM": "hostile.Hostile"}
    config |= {"architectures": ["Hostile"], "model_type": "hostile", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recipe(model: Path, *arguments: str):
    path = model.parent / "recipe.yaml"
    rows = model.parent / "rows.jsonl"
    rows.write_text('{"text": "The river runs past the old mill."}\n' * 4)
    values = {"method": "sft", "model_name_or_path": str(model), "dataset_name": str(rows), "use_cpu": True}
    values |= {"bf16": False, "report_to": "none", "output_dir": str(model.parent / "out"), "max_steps": 1}
    path.write_text(yaml.safe_dump(values | {"gradient_checkpointing": False}))
    return parse_recipe(["--config", str(path), *arguments])


@pytest.mark.promise("A model's own Python files run only with trust_remote_code on the command line or --allow-code")
def test_code_of_a_model_does_not_run_unasked(model: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_config(str(model))
    load_tokenizer(str(model))  # has none of its own
    assert "failed" in {result for _, result, _ in check_recipe(recipe(model)).findings}
    with pytest.raises(ValueError, match="trust_remote_code"):
        build_trainer(recipe(model), None)
    assert CANARY not in os.environ


@pytest.mark.promise("The dry run and the training agree on whether a model's own code may run")
@pytest.mark.parametrize(
    "words",
    [
        ["--trust_remote_code", "true"],
        pytest.param(["--model_init_kwargs", '{"trust_remote_code": true}'], marks=pytest.mark.slow),
    ],
    ids=["trust_remote_code", "model_init_kwargs"],
)
def test_the_users_word_counts_in_dry_run_and_training(model: Path, words: list[str]) -> None:
    findings = check_recipe(recipe(model, *words)).findings
    assert {result for _, result, _ in findings} <= {"ok", "note"}, findings
    assert CANARY in os.environ, "the payload is live"
    assert type(build_trainer(recipe(model, *words), None).model).__name__ == "Hostile"
