"""Every file in recipes/ and configs/ is read by the parser that a user's command would read it with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from benchmarks.experiments.recipe import load_recipe
from qscope_posttrain.analysis.benchmarks.items import benchmark_sources
from qscope_posttrain.cli import features, steer
from qscope_posttrain.cli.sae import train as sae_train
from qscope_posttrain.cli.training import grpo, sft
from qscope_posttrain.rl.rewards import reward_function
from qscope_posttrain.rl.rollouts.vllm_memory import vllm_memory

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((ROOT / "recipes" / "experiments").glob("*.yaml"))
RECIPES = sorted(set((ROOT / "recipes").glob("*/*.yaml")) - set(EXPERIMENTS))
SFT, TOKEN, GRPO = (
    [path for path in RECIPES if path.stem.startswith(stem)] for stem in ("sasft", "token_penalty", "steered_dapo")
)
SAE = [path for path in RECIPES if path.stem.startswith("train_sae")]
ANALYSIS = [path for path in RECIPES if path.parent.name == "analysis"]
PLAIN = [path for path in RECIPES if path.stem.startswith(("synthesis", "sft_"))]
SEEDED = [path for path in RECIPES if path.stem.startswith("grpo_")]
REPETITION = [path for path in RECIPES if path.stem.startswith("find_repetition")]
CASE_STUDIES = {
    "language_mixing_rank": (features, ["rank", "--response", "x"]),
    "language_mixing_steer": (steer, ["--prompt", "x"]),
    "classical_chinese_contrast": (features, ["contrast", "--positive", "a.txt", "--negative", "b.txt"]),
    "classical_chinese_steer": (steer, ["--prompt", "x"]),
}
"""Recipe -> its command's module, and what its header adds to it on the command line."""
STEERING = [path for path in RECIPES if path.stem.startswith("steer_")]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_nothing_is_missing():
    assert {path.relative_to(ROOT / "recipes").as_posix() for path in RECIPES} >= {
        "testbed/sasft.yaml",
        "testbed/token_penalty.yaml",
        "qwen3-1.7b/sasft_zh.yaml",
        "qwen3-1.7b/token_penalty_zh.yaml",
        "qwen3-8b/sasft_zh.yaml",
        "testbed/steered_dapo.yaml",
        "qwen3-1.7b/steered_dapo.yaml",
        "qwen3-8b/steered_dapo.yaml",
        "qwen3-30b-a3b/steered_dapo.yaml",
    }
    studies = [path for path in RECIPES if path.parent.name == "case_studies"]
    assert {path.stem for path in studies} == set(CASE_STUDIES)
    read = SFT + TOKEN + PLAIN + GRPO + SEEDED + REPETITION + SAE + ANALYSIS + STEERING + studies
    assert sorted(read) == RECIPES  # no recipe is left unread
    names = {"cpu", "ddp", "fsdp2", "zero2", "zero3", "multi_node_fsdp2", "multi_node_zero3"}
    assert {path.stem for path in CONFIGS} >= names


def _name(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def _check_written_is_resolved(path: Path, resolved: dict) -> None:
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    different = {key: resolved[key] for key, value in written.items() if resolved[key] != value}
    assert different.keys() <= {"use_cpu", "save_strategy", "report_to", "dataset_kwargs", "lora_target_modules"}


@pytest.mark.parametrize("path", SFT, ids=_name)
def test_sft_recipe_parses_as_a_dry_run(path):
    """A dry run stands in for the GPU, which a recipe for a real model asks for."""
    recipe = sft.parse_recipe(["--config", str(path), "--dry_run"])
    assert recipe.penalty.target == "zh"
    assert recipe.run.features
    _check_written_is_resolved(path, recipe.to_dict())


@pytest.mark.parametrize("path", TOKEN, ids=_name)
def test_token_penalty_recipe_is_the_combination_that_did_best(path):
    recipe = sft.parse_recipe(["--config", str(path), "--dry_run"])
    assert (recipe.run.method, recipe.run.features) == ("token_penalty", None)
    assert (recipe.penalty.target, recipe.penalty.weight, recipe.penalty.anchor_weight) == ("zh", 40.0, 1.0)
    _check_written_is_resolved(path, recipe.to_dict())


@pytest.mark.parametrize("path", ANALYSIS, ids=_name)
def test_analysis_recipe_names_benchmarks(path):
    sources = benchmark_sources([str(path)])
    assert {source.name for source in sources} == set(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", CASE_STUDIES)
def test_case_study_is_read_by_its_command(name):
    module, arguments = CASE_STUDIES[name]
    path = ROOT / "recipes" / "case_studies" / f"{name}.yaml"
    options = vars(module.build_parser().parse([*arguments, "--config", str(path)]))
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    as_text = {"layers": lambda layers: [str(layer) for layer in layers]}
    assert all(options[key] == as_text.get(key, lambda value: value)(value) for key, value in written.items())


@pytest.mark.parametrize("path", STEERING, ids=_name)
def test_dose_curve_of_a_real_model_is_read_by_its_command(path):
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    options = vars(steer.build_parser().parse(["--features", "x", "--prompt", "x", "--config", str(path)]))
    assert {key: options[key] for key in written} == written
    assert written["curve"]


@pytest.mark.parametrize("path", REPETITION, ids=_name)
def test_finding_of_repetition_is_read_by_its_command(path):
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    options = vars(features.build_parser().parse(["find-repetition", "--config", str(path)]))
    assert {key: options[key] for key in written} == written


@pytest.mark.parametrize("path", SEEDED, ids=_name)
def test_grpo_recipe_without_features_parses_as_a_dry_run(path):
    recipe = grpo.parse_recipe(["--config", str(path), "--allow-code", "--dry_run"])
    assert (recipe.training.negative, recipe.run.features) == ("seeded", None)
    assert all(callable(reward_function(spec)) for spec in recipe.run.rewards)
    _check_written_is_resolved(path, recipe.to_dict())


@pytest.mark.parametrize("path", PLAIN, ids=_name)
def test_recipe_of_plain_training_parses_as_a_dry_run(path):
    recipe = sft.parse_recipe(["--config", str(path), "--dry_run"])
    assert recipe.run.method == "sft"
    _check_written_is_resolved(path, recipe.to_dict())


@pytest.mark.parametrize("path", GRPO, ids=_name)
def test_grpo_recipe_parses_as_a_dry_run(path):
    code = ["--allow-code"] if path.parent.name == "testbed" else []  # its reward is of the repository
    recipe = grpo.parse_recipe(["--config", str(path), *code, "--dry_run"])
    training = recipe.training
    assert (training.negative, training.negatives_per_group) == ("feature", 1)
    assert recipe.run.features
    assert (training.loss_type, training.epsilon, training.epsilon_high, training.beta) == ("dapo", 0.2, 0.28, 0.0)
    # A process alone holds whole groups at a time, so that the recipe fits any number of processes.
    assert training.per_device_train_batch_size * training.steps_per_generation % training.num_generations == 0
    assert training.gradient_accumulation_steps % (training.steps_per_generation * training.num_iterations) == 0
    assert all(callable(reward_function(spec)) for spec in recipe.run.rewards)
    _check_written_is_resolved(path, recipe.to_dict())


@pytest.mark.parametrize("size", ["1.7b", "8b", "30b-a3b"])
def test_steered_recipes_of_real_models_are_the_report_as_written(size):
    path = ROOT / "recipes" / f"qwen3-{size}" / "steered_dapo.yaml"
    training = grpo.parse_recipe(["--config", str(path), "--dry_run"]).training
    assert training.mode == "paper"
    assert not training.dynamic_sampling
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == 512
    assert training.bf16
    assert training.gradient_checkpointing


@pytest.mark.parametrize(
    ("size", "gib", "shape"),
    [
        ("8b", 80, {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                    "num_key_value_heads": 8}),
        ("30b-a3b", 95, {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
                         "num_key_value_heads": 4, "num_experts": 128}),
    ],
)  # fmt: skip
def test_rows_of_large_recipes_fit_into_vllm_as_they_say(size, gib, shape):
    training = grpo.parse_recipe(
        ["--config", str(ROOT / "recipes" / f"qwen3-{size}" / "steered_dapo.yaml"), "--dry_run"]
    ).training
    assert (training.use_vllm, training.vllm_mode) == (True, "colocate")
    config = (Qwen3MoeConfig if "num_experts" in shape else Qwen3Config)(
        vocab_size=151936, num_attention_heads=32, head_dim=128, tie_word_embeddings=False, dtype="bfloat16", **shape
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shared = training.vllm_tensor_parallel_size
    rows = vllm_memory(model, 4500, shared).rows(training.vllm_gpu_memory_utilization * gib * 1024**3)
    assert rows == {"8b": 33, "30b-a3b": 133}[size]
    assert rows >= training.per_device_train_batch_size * training.steps_per_generation * shared


@pytest.mark.parametrize(("size", "layers", "published"), [("1.7b", 28, 5e-4), ("8b", 36, 1e-3)])
def test_recipes_of_real_models_are_the_published_runs(size, layers, published):
    path = ROOT / "recipes" / f"qwen3-{size}" / "sasft_zh.yaml"
    recipe = sft.parse_recipe(["--config", str(path), "--dry_run"])
    training = recipe.training
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == 256
    assert recipe.penalty.weight == pytest.approx(published * 32)
    assert recipe.penalty.layers == (layers - 2, layers - 1)
    assert training.use_liger_kernel
    assert training.bf16
    assert training.gradient_checkpointing


@pytest.mark.parametrize("path", SAE, ids=_name)
def test_sae_recipe_is_read_and_fits_its_own_limits(path):
    recipe = sae_train.parse_recipe(["--config", str(path)])
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    resolved = recipe.to_dict()
    assert {
        key: list(resolved[key]) if isinstance(resolved[key], tuple) else resolved[key] for key in written
    } == written
    width, expansion = {
        "qwen3-0.6b": (1024, 16), "qwen3-1.7b": (2048, 16), "train_sae_smollm2": (576, 8), "train_sae_gemma3": (640, 8),
    }[path.stem if path.parent.name == "real" else path.parent.name]  # fmt: skip
    assert recipe.training.latents(width) == expansion * width
    assert recipe.training.auxk_weight == 1 / 32
    needed = recipe.stream.buffer_bytes(len(recipe.arguments.layers), width, 1)
    assert needed <= recipe.stream.max_buffer_gib * 1024**3
    assert recipe.stream.block_tokens % recipe.training.batch_tokens == 0


def test_sae_recipe_names_one_source_of_text():
    with pytest.raises(ValueError, match=r"'texts'.*or 'dataset'"):
        sae_train.parse_recipe(["--model", "x"])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=_name)
def test_experiment_is_valid_as_written_and_in_each_of_its_variants(path):
    variants = yaml.safe_load(path.read_text(encoding="utf-8"))["variants"]
    assert {"small", "gpu"} <= set(variants)
    whole = load_recipe(path)
    assert whole.title
    assert whole.question
    for name in variants:
        recipe = load_recipe(path, name)
        assert recipe.kind == whole.kind
        assert {cell.settings.device for cell in recipe.cells} == ({"cuda"} if name == "gpu" else {"cpu"})


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
