"""A training that is stopped: by a signal, by weights that are no numbers, or while it writes a checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qscope_posttrain.cli.main import main
from qscope_posttrain.cli.training.interruption import STATE, last_checkpoint
from qscope_posttrain.cli.training.run import _save_model
from tests.free_port import free_port

ROOT = Path(__file__).parents[2]
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


@pytest.fixture
def in_step(monkeypatch):
    """Calls a function within a training step, after its backward pass."""
    monkeypatch.delenv("QSCOPE_QUIET", raising=False)
    training_step = transformers.Trainer.training_step

    def install(step, act):
        def replaced(self, model, *arguments, **more):
            loss = training_step(self, model, *arguments, **more)
            if self.state.global_step == step - 1:
                act(model)
            return loss

        monkeypatch.setattr(transformers.Trainer, "training_step", replaced)

    return install


@pytest.mark.promise("A signal ends a training after the step, with a checkpoint from which the same command goes on")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint_from_which_the_run_goes_on(world, tmp_path, in_step, capsys, number):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, broken = (world.recipe(tmp_path / name / "r.yaml", **SAVING) for name in ("whole", "broken"))
    assert main(["sft", "--config", whole]) == 0
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    in_step(3, lambda model: os.kill(os.getpid(), number))
    assert main(["sft", "--config", broken]) == 128 + number
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    said = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name} after step 3" in said
    assert "--resume_from_checkpoint last" in said
    out = tmp_path / "broken" / "out"
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not (out / "model.safetensors").exists()
    assert not (out / "summary.json").exists()
    in_step(0, None)
    assert main(["sft", "--config", broken, "--resume_from_checkpoint", "last"]) == 0
    expected = load_file(tmp_path / "whole" / "out" / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_checkpoints_a_signal_saves_nothing(world, tmp_path, in_step, capsys):
    in_step(2, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    recipe = world.recipe(tmp_path / "r.yaml", max_steps=4, logging_steps=1)
    assert main(["sft", "--config", recipe]) == 128 + signal.SIGTERM
    assert "after step 2; nothing is saved" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.promise("Weights that are not finite end the training and are not saved")
@pytest.mark.parametrize(("step", "kept"), [(1, None), (3, "checkpoint-2"), (4, "checkpoint-2"), (6, "checkpoint-4")])
def test_weights_that_are_no_numbers_are_not_saved(world, tmp_path, in_step, capsys, step, kept):
    def break_it(model):
        with torch.no_grad():
            next(weight for weight in model.parameters() if weight.requires_grad).view(-1)[5] = float("nan")

    in_step(step, break_it)
    recipe = world.recipe(tmp_path / "r.yaml", **SAVING, save_total_limit=1)
    assert main(["sft", "--config", recipe]) == 2
    said = capsys.readouterr().err
    assert "The training has diverged" in said
    assert (f"{kept}' is the last checkpoint" if kept else "There is no checkpoint") in said
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ([kept] if kept else [])
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.promise("A checkpoint that was not written to its end is passed over")
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(world, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("QSCOPE_QUIET", raising=False)
    recipe = world.recipe(tmp_path / "r.yaml", **SAVING)
    assert main(["sft", "--config", recipe, "--resume_from_checkpoint", "last"]) == 0  # there is none: from the start
    assert "training starts from the beginning" in capsys.readouterr().err
    out = tmp_path / "out"
    expected = load_file(out / "model.safetensors")
    assert last_checkpoint(out).name == "checkpoint-6"
    (out / "checkpoint-6" / STATE).unlink()
    (out / "checkpoint-10").mkdir()
    shutil.copy(out / "checkpoint-2" / STATE, out / "checkpoint-10" / STATE)
    text = (out / "checkpoint-10" / STATE).read_text()
    (out / "checkpoint-10" / STATE).write_text(text[: len(text) // 2])
    (out / "checkpoint-of-mine").mkdir()
    recipe = world.recipe(tmp_path / "r.yaml", **SAVING, resume_from_checkpoint=True)
    assert main(["sft", "--config", recipe]) == 0
    said = capsys.readouterr().err
    assert re.search(r"checkpoint-10' was not written to its end", said)
    assert re.search(r"checkpoint-6' was not written to its end", said)
    assert "resuming from" in said
    assert "checkpoint-4" in said
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.promise("A signal ends a training after the step, with a checkpoint from which the same command goes on")
@pytest.mark.slow  # two processes import torch and trl
def test_a_signal_to_one_rank_stops_both_after_the_same_step(world, tmp_path):
    recipe = world.recipe(tmp_path / "r.yaml", **{**SAVING, "max_steps": 200, "save_steps": 500})
    script = tmp_path / "one_rank.py"
    script.write_text(
        "import os, signal, sys, transformers\n"
        "from qscope_posttrain.cli.main import main\n"
        "log = transformers.Trainer.log\n"
        "def logged(self, logs, *a, **k):\n"
        "    log(self, logs, *a, **k)\n"
        "    if self.state.global_step == 3 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "transformers.Trainer.log = logged\n"
        "status = main(sys.argv[1:])\n"
        f"open(os.path.join({str(tmp_path)!r}, 'status' + os.environ['RANK']), 'w').write(str(status))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "cpu.yaml")]
    command += ["--main_process_port", str(free_port()), str(script), "sft", "--config", recipe]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert [(tmp_path / f"status{rank}").read_text() for rank in (0, 1)] == ["143", "143"], done.stderr[-3000:]
    (kept,) = (tmp_path / "out").glob("checkpoint-*")
    assert kept == last_checkpoint(tmp_path / "out")
    assert json.loads((kept / STATE).read_text())["global_step"] == int(kept.name.removeprefix("checkpoint-"))


@pytest.mark.promise(
    "A training is resumed on the same rows, in the same order, with the same number of them in a step"
)
def test_a_training_is_not_resumed_on_other_rows(world, tmp_path, capsys):
    recipe = world.recipe(tmp_path / "r.yaml", **{**SAVING, "max_steps": 2}, gradient_accumulation_steps=2)
    assert main(["sft", "--config", recipe]) == 0
    lines = Path(world.data).read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join([*lines[1:], lines[0]]))
    resumed = ["sft", "--config", recipe, "--resume_from_checkpoint", "last", "--max_steps", "3"]
    for change, words in (
        (["--dataset_name", str(tmp_path / "other.jsonl")], "data was '20 rows, "),
        (["--gradient_accumulation_steps", "1"], "rows per step was 8, is 4"),
        (["--seed", "7"], "seed was 42, is 7"),
    ):
        assert main([*resumed, *change]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert "is the last checkpoint: go on" not in said
    same = ["--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "8"]
    assert main([*resumed, *same]) == 0


def test_a_model_is_saved_over_another_with_folders(tmp_path):
    words = ["first", "second"]

    def save_model(folder, _internal_call):
        (Path(folder) / "templates").mkdir(parents=True)
        for name in ("templates/tools.jinja", "config.json"):
            (Path(folder) / name).write_text(word)

    trainer = SimpleNamespace(save_model=save_model, args=SimpleNamespace(should_save=True))
    while words:
        word = words.pop(0)
        _save_model(trainer, tmp_path)
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert written == {"config.json": "second", "templates/tools.jinja": "second"}
    assert not (tmp_path / ".model.part").exists()


@pytest.mark.promise("A training that was complete is not taken a step further by the same command")
def test_a_complete_training_ends_where_it_was(world, tmp_path):
    recipe = world.recipe(tmp_path / "r.yaml", **{**SAVING, "max_steps": 3}, resume_from_checkpoint="last")
    assert main(["sft", "--config", recipe]) == 0
    out = tmp_path / "out"
    expected = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()  # killed while it was saved
    (out / "summary.json").unlink()
    assert main(["sft", "--config", recipe]) == 0
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((out / "summary.json").read_text())["results"]["steps"] == 3
    assert not (out / ".model.part").exists()
    assert [path.name for path in out.glob("checkpoint-*")].count("checkpoint-4") == 0
