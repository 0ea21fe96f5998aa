"""`qscope grpo` on a tiny saved model: training, its files, overrides, mistakes, dry run, resume, two processes."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.launching import ON_A_CPU
from qscope_posttrain.cli.main import main
from qscope_posttrain.cli.training import load_rows
from qscope_posttrain.cli.training.grpo import parse_recipe
from qscope_posttrain.cli.training.grpo_checks import check_prompts
from qscope_posttrain.cli.training.run import build_model
from qscope_posttrain.errors import UserError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.rl.metrics import final_metrics, results_table

ROOT = Path(__file__).resolve().parents[2]
STEERING = {
    "label": "zh", "layer": 3, "strength": 1.5, "unit": "relative", "window_start": [1, 3], "window_length": 4
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(world, tmp_path_factory) -> dict[str, str]:
    """Features with a chosen steering, prompts as text with the column `solution`, and as messages."""
    folder = tmp_path_factory.mktemp("grpo")
    found = FeatureSet.load(world.features)
    replace(found, settings={**found.settings, "steering": STEERING}).save(folder / "features.safetensors")
    found.select(language="zh").save(folder / "unsteered.safetensors")
    lines = [json.loads(line) for line in Path(world.data).read_text().splitlines()]
    text = [{"prompt": row["prompt"], "language": row["language"], "solution": "7"} for row in lines]
    messages = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in text]
    return {
        "features": str(folder / "features.safetensors"),
        "unsteered": str(folder / "unsteered.safetensors"),
        "text": _rows(folder / "text.jsonl", text),
        "messages": _rows(folder / "messages.jsonl", messages),
    }


def write_recipe(world, inputs, folder: Path, **changes) -> str:
    """A recipe that trains two steps on the CPU, with changes; None leaves a key out."""
    keys = {
        "model_name_or_path": world.model,
        "dataset_name": inputs["text"],
        "features": inputs["features"],
        "rewards": ["repetition_penalty", {"name": "language_consistency", "column": "language"}],
        "gate": "keep",
        "negative_tokens": "all",
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 10,
        "learning_rate": 1e-3,
        **ON_A_CPU,
    }
    keys |= changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    return str(path)


@pytest.fixture
def recipe(world, inputs):
    """`write_recipe` with the inputs of this module."""
    return partial(write_recipe, world, inputs)


@pytest.fixture(scope="module")
def trained(world, inputs, tmp_path_factory) -> Path:
    """Output folder of a run of three steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_recipe(world, inputs, folder, max_steps=3, save_strategy="steps", save_steps=1)
    assert main(["grpo", "--config", path]) == 0
    return folder / "out"


def test_a_run_saves_a_model_that_has_moved(world, trained):
    before = AutoModelForCausalLM.from_pretrained(world.model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(trained).state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_summary_has_both_kinds_of_rows_apart(trained):
    summary = json.loads((trained / "summary.json").read_text())
    results = summary["results"]
    assert (summary["command"], summary["seeds"], results["steps"]) == ("grpo", [42], 3)
    steps = [entry for entry in results["log"] if "loss" in entry]
    assert [entry["negative/rows"] for entry in steps] == [1.0, 1.0, 1.0]  # one group of four rows
    assert results["final"]["negative/rows"] == 1.0
    for name in ("ordinary/reward", "negative/reward", "negative/looped", "ordinary/repeat_ratio", "negative/length"):
        assert results["final"][name] == pytest.approx(sum(entry[name] for entry in steps) / 3), name
    table = {row[0]: row[1:] for row in results["table"]["rows"]}
    assert table["reward"] == [results["final"]["ordinary/reward"], results["final"]["negative/reward"]]
    assert table["rows in a batch"] == [None, 1.0]
    assert len(results["features"]["sha256"]) == 64


def test_final_metrics_are_means_over_the_last_entries_of_training():
    log = [{"loss": 1.0, "ordinary/reward": float(step), "step": step} for step in range(4)]
    log[3] |= {"negative/looped": 0.5}
    log[2] |= {"negative/looped": math.nan, "negative/advantage": math.nan, "negative/reward": None}
    log += [{"eval_loss": 9.0, "ordinary/reward": 99.0}, {"train_runtime": 1.0, "train_loss": 0.0}]
    final = final_metrics(log, last=2)
    assert final["ordinary/reward"] == 2.5
    assert final["negative/looped"] == 0.5
    assert math.isnan(final["negative/advantage"])
    assert final.keys() == {"loss", "ordinary/reward", "negative/looped", "negative/advantage"}
    rows = {row[0]: row[1:] for row in results_table(log, last=2).formatted()}
    assert rows == {
        "reward": ("2.5", "-"), "advantage": ("-", "-"), "share that repeats without end": ("-", "0.5"),
    }  # fmt: skip
    assert results_table([]).rows == ()


def test_a_refused_resume_leaves_what_the_run_has_written(trained, recipe, tmp_path, capsys):
    folder = tmp_path / "again"
    shutil.copytree(trained, folder)
    path = recipe(tmp_path, max_steps=4, output_dir=str(folder), seed=7)
    assert main(["grpo", "--config", path, "--resume_from_checkpoint", str(folder / "checkpoint-2")]) == 2
    assert "seed was 42, is 7" in capsys.readouterr().err
    assert (folder / "resolved.yaml").read_text() == (trained / "resolved.yaml").read_text()


def test_resolved_configuration_reads_back_as_the_same_recipe(world, trained):
    text = (trained / "resolved.yaml").read_text()
    comments = yaml.safe_load("\n".join(line[2:] for line in text.splitlines() if line.startswith("# ")))
    assert comments["versions"]["torch"] == importlib.metadata.version("torch")
    assert len(comments["features"]["sha256"]) == 64
    again = parse_recipe(["--config", str(trained / "resolved.yaml")])
    assert yaml.safe_load(text) == again.to_dict()
    assert yaml.safe_load(text) == json.loads((trained / "summary.json").read_text())["settings"]
    assert (again.training.max_steps, again.training.gate, again.model_name) == (3, "keep", world.model)
    assert again.run.rewards[1] == {"name": "language_consistency", "column": "language"}


def test_a_resumed_run_equals_one_that_was_not_killed(recipe, trained, tmp_path):
    path = recipe(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    arguments = ["grpo", "--config", path, "--resume_from_checkpoint", str(trained / "checkpoint-2")]
    assert main(arguments) == 0
    resumed, whole = load_file(tmp_path / "out/model.safetensors"), load_file(trained / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    log = json.loads((tmp_path / "out/summary.json").read_text())["results"]["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]


def test_a_signal_inside_a_generation_batch_still_ends_with_a_checkpoint(recipe, tmp_path, monkeypatch):
    path = recipe(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, steps_per_generation=2)
    step = Trainer.training_step

    def interrupted(self, *arguments, **more):
        if self.state.global_step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        assert main(["grpo", "--config", path]) == 143
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert main(["grpo", "--config", path, "--resume_from_checkpoint", "last"]) == 0
    assert json.loads((tmp_path / "out/summary.json").read_text())["results"]["steps"] == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "dataset_name": "messages"},
        {"negatives_per_group": 0, "features": "not_found_yet.safetensors"},
        {"negative": "seeded", "features": None, "reward_weights": [1.0, 0.5]},
        pytest.param({"mode": "paper", "gate": None, "negative_tokens": None}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 2, "num_iterations": 2, "soft_overlong_cache": 0, "eval_strategy": "steps",
         "eval_steps": 1, "dataset_test_split": "train", "per_device_eval_batch_size": 4, "max_steps": 1},
    ],
    ids=["lora-messages", "plain", "seeded", "paper", "accumulation-evaluation"],
)  # fmt: skip
def test_ways_of_training(recipe, inputs, tmp_path, changes):
    if "dataset_name" in changes:
        changes = {**changes, "dataset_name": inputs[changes["dataset_name"]]}
    if changes.get("eval_strategy"):
        rows = [json.loads(line) for line in Path(inputs["text"]).read_text().splitlines()][:2]
        changes = {**changes, "dataset_name": _rows(tmp_path / "few.jsonl", rows)}
    assert main(["grpo", "--config", recipe(tmp_path, **changes)]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]
    steps = [entry for entry in summary["log"] if "loss" in entry]
    negatives = 0.0 if changes.get("negatives_per_group") == 0 else 1.0
    accumulated = changes.get("gradient_accumulation_steps", 1)
    assert all(entry["negative/rows"] == negatives * accumulated for entry in steps)
    assert ("negative/looped" in steps[0]) == bool(negatives)
    assert any("eval_reward" in entry for entry in summary["log"]) == ("eval_strategy" in changes)
    saved = "adapter_model.safetensors" if "use_peft" in changes else "model.safetensors"
    assert (tmp_path / "out" / saved).is_file()


def test_command_line_overrides_the_recipe(recipe, tmp_path):
    path = recipe(tmp_path)
    reward = '{"name": "soft_overlong", "max_completion_len": 10, "soft_punish_cache": 2}'
    found = parse_recipe([f"--config={path}", "--rewards", "ngram_repetition", reward, "--window_start", "2", "5",
                          "--steering-strength", "0.5", "--negative_weight", "0.25"])  # fmt: skip
    assert found.run.rewards == ["ngram_repetition", json.loads(reward)]
    training = found.training
    assert (training.window_start, training.steering_strength, training.negative_weight) == ([2, 5], 0.5, 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steering_strenght": 1}, "unknown key 'steering_strenght' in {recipe}. Did you mean 'steering_strength'?"),
        ({"negative": "featur"}, "Did you mean 'feature'?"),
        ({"gate": "shut"}, "gate must be one of drop, keep"),
        ({"num_generations": 2, "per_device_train_batch_size": 4}, "fewer than 2 ordinary rows"),
        ({"num_generations": 3}, "divisible by num_generations"),
        ({"mode": "paper", "gate": "drop"}, "mode='paper' is the report's method as written"),
        ({"use_vllm": True, "generation_kwargs": {"stop": ["."]}}, "generation_kwargs: stop="),
        ({"features": None, "negative": "feature"}, "negative: feature needs 'features'"),
        ({"features": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"features": "{unsteered}"}, "No layer given"),
        ({"steering_layer": 1}, "layer 1 is not in this FeatureSet"),
        ({"model_name_or_path": None}, "needs 'model_name_or_path'"),
        ({"dataset_name": "nowhere.jsonl"}, "no training data at 'nowhere.jsonl'"),
        ({"dataset_name": "{texts}"}, "GRPO needs a column 'prompt'"),
        ({"rewards": []}, "needs 'rewards'"),
        ({"rewards": ["repetition_penalti"]}, "Did you mean 'repetition_penalty'?"),
        ({"rewards": ["nowhere.at_all"]}, "there is no module 'nowhere'"),
        ({"rewards": ["os.system"]}, "is no reward function"),
        ({"rewards": [{"option": 1}]}, "a mapping with 'name'"),
        ({"rewards": [{"name": "repetition_penalty", "copies": 2}]}, "copies"),
        ({"rewards": ["{not json"]}, "not JSON"),
        ({"rewards": ["reward_of_points.reward"]}, "needs the column 'points' in the data, which has language, prompt"),
        ({"rewards": ["accuracy_reward"]}, "needs `pip install math-verify`"),
        ({"reward_weights": [1.0]}, "reward_weights has 1 numbers for 2 rewards"),
    ],
)
def test_a_mistake_is_one_clear_line(inputs, recipe, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("qscope_posttrain.cli.training.grpo_checks.is_math_verify_available", lambda: False)
    (tmp_path / "reward_of_points.py").write_text("def reward(completions, points, **_):\n    return points\n")
    texts = _rows(tmp_path / "texts.jsonl", [{"text": "a"}])
    names = {"unsteered": inputs["unsteered"], "texts": texts}
    filled = {key: value.format(**names) if isinstance(value, str) else value for key, value in changes.items()}
    path = recipe(tmp_path, **filled)
    assert main(["grpo", "--config", path, "--allow-code"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message.format(recipe=path) in lines[0]


def test_a_reward_that_fails_in_a_later_step_keeps_its_traceback(recipe, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reward_that_breaks.py").write_text(
        "calls = []\n\ndef reward(completions, **_):\n    calls.append(1)\n    if len(calls) > 1:\n"
        "        raise ValueError('a bug of the reward')\n    return [0.0] * len(completions)\n"
    )
    path = recipe(tmp_path, rewards=["reward_that_breaks.reward"], negatives_per_group=0)
    with pytest.raises(ValueError, match="a bug of the reward") as caught:
        main(["grpo", "--config", path, "--allow-code"])
    assert not isinstance(caught.value, UserError)


def test_dry_run_says_what_would_happen_and_trains_nothing(recipe, tmp_path, capsys):
    path = recipe(tmp_path, use_peft=True, per_device_train_batch_size=8, negatives_per_group=2)
    assert main(["grpo", "--config", path, "--dry_run"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("can be written", "4 layers of width 64", "parameters are trained", "fit the model",
                  "the last 2 rows of a group of 4", "on layer 3, strength 1.5 relative",
                  "from a generated token drawn in 1 to 3 for 4 tokens, then free",
                  "mode default: gate keep, tokens all, weight 1",
                  "20 rows with prompt, language, solution", "text; the first 20 have",
                  "1 x repetition_penalty (0 for a prompt repeated)",
                  "over the last 2 tokens", "= 8 completions at a time, 2 groups of 4, 4 negatives",
                  "2 steps"):  # fmt: skip
        assert words in shown, words
    assert "failed" not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "what", "message"),
    [
        ({"output_dir": "{text}/out"}, "output folder", "cannot write"),
        ({"model_name_or_path": "nowhere"}, "tokenizer", "no model 'nowhere'"),
        ({"model_name_or_path": "{narrow}"}, "features", "hidden_size 64 in the features, 32 in the model"),
        ({"features": "{unsteered}"}, "negatives", "No layer given"),
        ({"max_completion_length": 600}, "prompts", "the model has 512 positions"),
        ({"dataset_name": "{untemplated}", "model_name_or_path": "{bare}"}, "prompts", "no chat template"),
        ({"rewards": ["trl.rewards.think_format_reward"]}, "rewards", "cannot score a completion of the first row"),
        ({"resume_from_checkpoint": "nowhere"}, "checkpoint", "no checkpoint of a trainer"),
        ({"negatives_per_group": 0, "use_peft": True, "lora_target_modules": ["nothing"]}, "adapter", "nothing"),
    ],
)
def test_dry_run_finds(world, inputs, recipe, tmp_path, capsys, make_model, tiny_tokenizer, changes, what, message):
    names = {"text": inputs["text"], "unsteered": inputs["unsteered"], "narrow": str(tmp_path / "narrow"),
             "bare": str(tmp_path / "bare"), "untemplated": inputs["messages"]}  # fmt: skip
    if "model_name_or_path" in changes:
        make_model("qwen3", hidden_size=32).save_pretrained(names["narrow"])
        tiny_tokenizer.save_pretrained(names["narrow"])
        make_model("qwen3").save_pretrained(names["bare"])
        tokenizer = type(tiny_tokenizer).from_pretrained(world.model)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(names["bare"])
    filled = {key: value.format(**names) if isinstance(value, str) else value for key, value in changes.items()}
    assert main(["grpo", "--config", recipe(tmp_path, **filled), "--dry_run"]) == 1
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{what} failed" in shown
    assert message in shown


class TestEngine:
    """What a dry run says of what generates, for a recipe for a GPU that is not here."""

    @pytest.fixture
    def said(self, recipe, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

        def said(status: int, *words: str, **changes) -> str:
            keys = {"use_vllm": True, "use_cpu": None, "negatives_per_group": 0, **changes}
            assert main(["grpo", "--config", recipe(tmp_path, **keys), "--dry_run", *words]) == status
            lines = capsys.readouterr().out.replace("│", " ")
            return " ".join(lines.split()).partition(" engine ")[2].partition(" rewards ")[0]

        return said

    def test_transformers(self, said):
        assert said(0, use_vllm=False).startswith("ok transformers generates")

    def test_memory_of_vllm_and_rows_that_fit(self, said):
        """Four layers of 2 heads of 16 in bfloat16: 0.5 KiB per token; ten tokens after a prompt take few blocks."""
        words = said(0, "--device_memory", "0.01", vllm_gpu_memory_utilization=0.5)
        assert "vLLM, colocated, in bfloat16: weights 0.0" in words
        assert "KV cache 0.5 KiB per token" in words
        assert "vllm_gpu_memory_utilization=0.5 of 0.01 GiB, less activations, holds" in words
        assert "of 4 at a time" in words
        assert "wait" not in words

    def test_rows_that_wait(self, said):
        words = said(0, "--device_memory", "0.0014", vllm_gpu_memory_utilization=0.5, per_device_train_batch_size=64)
        assert "of 64 at a time; the others wait" in words

    def test_without_a_size_and_at_a_server(self, said):
        assert "no GPU here: --device_memory GIB tells how many rows fit" in said(0)
        words = said(0, vllm_mode="server", vllm_server_base_url="http://there:8000")
        assert "vLLM, at the server http://there:8000" in words
        assert "the server's memory is not known here" in words

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vllm_gpu_memory_utilization": 0.001}, "holds no row beside the weights"),
            ({"vllm_max_model_length": 12}, "is less than the"),
        ],
    )
    def test_what_cannot_run_is_found(self, said, changes, message):
        words = said(1, "--device_memory", "0.01", **changes)
        assert words.startswith("failed")
        assert message in words

    def test_vllm_is_needed_where_the_recipe_would_train(self, said, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", None)
        assert "pip install 'qscope_posttrain[vllm]'" in said(1, use_cpu=True)

    def test_memory_is_named_for_a_dry_run_alone(self, recipe, tmp_path, capsys):
        for words, message in (([], "--dry_run alone"), (["--dry_run"], "must be positive")):
            assert main(["grpo", "--config", recipe(tmp_path), "--device_memory", "-1", *words]) == 2
            assert message in capsys.readouterr().err


class TestPrompts:
    """All prompts of a data set in memory, as the trainer reads them."""

    @pytest.mark.parametrize("options", [None, {"style": "terse"}])
    @pytest.mark.parametrize("kind", ["text", "messages"])
    def test_lengths_are_those_of_the_trainer(
        self, inputs, recipe, tmp_path, tiny_tokenizer, make_model, kind, options
    ):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = "{{ style }}" + tokenizer.chat_template
        settings = parse_recipe(["--config", recipe(tmp_path, dataset_name=inputs[kind])])
        settings.training.chat_template_kwargs = options
        rows = load_rows(settings, "train")
        trainer = GRPOTrainer(
            make_model(), lambda completions, **_: [0.0] * len(completions),
            train_dataset=rows, processing_class=tokenizer,
            args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", chat_template_kwargs=options),
        )  # fmt: skip
        expected = [len(ids) for ids in trainer._tokenize_prompts(rows["prompt"][:])[0]]
        assert check_prompts(settings, rows, tokenizer) == expected

    @pytest.mark.parametrize(
        ("first", "last", "message"),
        [
            (
                {"prompt": "a"},
                {"prompt": ""},
                "row 80 of the data: 'prompt' must be text or a list of messages; it is an empty text",
            ),
            (
                {"prompt": [{"role": "user", "content": "a"}]},
                {"prompt": []},
                "row 80 of the data: 'prompt' must be.*an empty list",
            ),
            ({"prompt": "a", "tools": "[]"}, None, "a column 'tools', which TRL's GRPO does not put into the prompt"),
            ({"prompt": "a", "chat_template_kwargs": {"b": 1}}, None, "a column 'chat_template_kwargs'"),
            ({"text": "a"}, None, "GRPO needs a column 'prompt'"),
        ],
    )
    def test_refused(self, recipe, tmp_path, tiny_tokenizer, first, last, message):
        settings = parse_recipe(["--config", recipe(tmp_path)])
        rows = Dataset.from_list([first] * 80 + [last or first])
        with pytest.raises(ValueError, match=message):
            check_prompts(settings, rows, tiny_tokenizer)

    def test_what_the_template_refuses(self, recipe, tmp_path, tiny_tokenizer):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}a"
        turn = {"role": "user", "content": "a"}
        rows = Dataset.from_list([{"prompt": [turn]}, {"prompt": [turn, turn]}])
        with pytest.raises(ValueError, match="row 1: the chat template cannot read 'prompt': one turn only"):
            check_prompts(parse_recipe(["--config", recipe(tmp_path)]), rows, tokenizer)


def _rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_check_before_the_weights_builds_nothing_sharded_under_zero3(recipe, tmp_path, monkeypatch):
    """DeepSpeed cannot shard a model on the meta device. It is not installed here: a stand-in that refuses any."""

    def refuse(*arguments, **more):
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(Init=refuse)))
    monkeypatch.setattr(transformers.modeling_utils, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(transformers.modeling_utils, "deepspeed_config", dict)
    model, words = build_model(parse_recipe(["--config", recipe(tmp_path)]))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert words.startswith("qwen3, 4 layers")
