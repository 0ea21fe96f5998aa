"""Every file in recipes/ and configs/ is read by the parser that a user's command would read it with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from qscope_posttrain.cli import demo
from qscope_posttrain.cli.sft_arguments import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_nothing_is_missing():
    assert {path.relative_to(ROOT / "recipes").as_posix() for path in RECIPES} >= {
        "testbed/sasft.yaml",
        "qwen3-1.7b/sasft_zh.yaml",
        "qwen3-8b/sasft_zh.yaml",
    }
    names = {"cpu", "ddp", "fsdp2", "zero2", "zero3", "multi_node_fsdp2", "multi_node_zero3"}
    assert {path.stem for path in CONFIGS} >= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe_parses_as_a_dry_run(path):
    """A dry run stands in for the GPU, which a recipe for a real model asks for."""
    recipe = parse_recipe(["--config", str(path), "--dry_run"])
    assert recipe.penalty.target == "zh"
    assert recipe.run.features
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    resolved = recipe.to_dict()
    different = {key: resolved[key] for key, value in written.items() if resolved[key] != value}
    assert different.keys() <= {"use_cpu", "save_strategy", "report_to", "dataset_kwargs"}


@pytest.mark.parametrize(("size", "layers", "published"), [("1.7b", 28, 5e-4), ("8b", 36, 1e-3)])
def test_recipes_of_real_models_are_the_published_runs(size, layers, published):
    recipe = parse_recipe(["--config", str(ROOT / "recipes" / f"qwen3-{size}" / "sasft_zh.yaml"), "--dry_run"])
    training = recipe.training
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == 256
    assert recipe.penalty.weight == pytest.approx(published * 32)
    assert recipe.penalty.layers == (layers - 2, layers - 1)
    assert training.use_liger_kernel
    assert training.bf16
    assert training.gradient_checkpointing


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_launch_file_is_read_by_accelerate(path):
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert (config.num_machines > 1) == path.stem.startswith("multi_node")
    assert config.use_cpu == (path.stem == "cpu")
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
        assert not config.fsdp_config["fsdp_activation_checkpointing"]  # the recipe's gradient_checkpointing does it
    if config.deepspeed_config:
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_slurm_example_is_valid_shell():
    subprocess.run(["bash", "-n", str(ROOT / "configs" / "slurm.sh")], check=True)


def test_demo_passes_every_setting_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("qscope_posttrain.testbed.demo.run_demo", lambda config, output: calls.append((config, output)))
    arguments = ["--output", str(tmp_path), "--seeds", "5", "6", "--corpus", "texts", "--no-cache", "--sae_k=8"]
    assert demo.run(arguments) == 0
    ((config, output),) = calls
    assert (config.seeds, config.corpus, config.no_cache, config.sae_k) == ([5, 6], "texts", True, 8)
    assert output == str(tmp_path)
    assert demo.run([]) == 0
    assert (calls[1][0].no_cache, calls[1][1]) == (False, "runs/demo")
