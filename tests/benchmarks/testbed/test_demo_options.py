"""The options of `qscope demo` become the settings of both tasks."""

from __future__ import annotations

import pytest

from benchmarks.testbed import command as demo
from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.switching.config import SwitchingConfig


def test_demo_passes_every_setting_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("benchmarks.testbed.demo.run_demo", lambda *settings: calls.append(settings))
    arguments = ["--output", str(tmp_path), "--seeds", "5", "6", "--corpus", "texts", "--no-cache", "--sae_k=8"]
    assert demo.run([*arguments, "--full"]) == 0
    ((config, output, repetition),) = calls
    assert (config.seeds, config.corpus, config.no_cache, config.sae_k) == ([5, 6], "texts", True, 8)
    assert output == str(tmp_path)
    assert (repetition.no_cache, repetition.seeds) == (True, [0, 1])
    assert demo.run([]) == 0
    assert (calls[1][0].no_cache, calls[1][1]) == (False, "runs/demo")


def test_demo_runs_either_half(monkeypatch):
    calls = []
    monkeypatch.setattr("benchmarks.testbed.demo.run_demo", lambda *settings: calls.append(settings))
    demo.run(["--part", "switching"])
    demo.run(["--part", "repetition", "--repetition_seeds", "3", "--repetition-updates", "2"])
    assert calls[0][0] is not None
    assert calls[0][2] is None
    assert calls[1][0] is None
    assert (calls[1][2].seeds, calls[1][2].updates) == ([3], 2)


def test_the_demo_is_small_by_default_and_gives_way_to_options(monkeypatch):
    calls = []
    monkeypatch.setattr("benchmarks.testbed.demo.run_demo", lambda *settings: calls.append(settings))
    demo.run(["--sae_steps", "77", "--repetition_updates", "5"])
    config, _, repetition = calls[0]
    assert config.pretraining_steps < SwitchingConfig().pretraining_steps
    assert config.sae_steps == 77
    assert repetition.habit_steps < RepetitionConfig().habit_steps
    assert repetition.updates == 5
    demo.run(["--quick"])
    demo.run(["--full", "--repetition-updates", "6"])
    assert calls[1][0] == SwitchingConfig(**demo.QUICK)
    assert calls[2][0] == SwitchingConfig()
    assert calls[2][2] == RepetitionConfig(updates=6)
    with pytest.raises(ValueError, match="--full and --quick"):
        demo.run(["--full", "--quick"])


def test_demo_takes_the_second_half_as_options_and_from_a_file(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("benchmarks.testbed.demo.run_demo", lambda *settings: calls.append(settings))
    recipe = tmp_path / "demo.yaml"
    recipe.write_text("quick: true\nsae_steps: 55\nrepetition_updates: 6\nrepetition_seeds: [4, 5]\nworkers: 2\n")
    demo.run(["--config", str(recipe), "--repetition-seeds", "7", "--repetition_top", "3"])
    config, _, repetition = calls[0]
    assert (config.sae_steps, config.sae_windows) == (55, demo.QUICK["sae_windows"])  # the file over the small run's
    assert (repetition.updates, repetition.seeds, repetition.top, repetition.workers) == (6, [7], 3, 2)
    assert repetition.habit_steps == demo.QUICK_REPETITION["habit_steps"]


@pytest.mark.parametrize("option", [["--sedes", "1"], ["--repetition_sedes", "1"], ["--repetition-updates", "x"]])
def test_demo_refuses_settings_it_does_not_know(option):
    with pytest.raises(ValueError, match=option[0].strip("-").replace("-", ".")):
        demo.run(option)
