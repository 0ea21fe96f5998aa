"""The whole chain on a model that is trained for seconds: what it makes, and that it makes it once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.testbed.demo import run_demo
from benchmarks.testbed.repetition import experiment as runs
from benchmarks.testbed.repetition import report
from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.repetition.experiment import Experiment, run_experiment
from benchmarks.testbed.repetition.features import TO_END, WINDOW
from qscope_posttrain.cli.training import grpo
from qscope_posttrain.features.feature_set import FeatureSet

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]

TINY = RepetitionConfig(
    fewest_operations=1,
    most_operations=2,
    answer_tokens=40,
    hidden_size=32,
    intermediate_size=48,
    model_layers=2,
    heads=2,
    pretraining_batch_size=16,
    habit_loops=0.6,
    habit_steps=150,
    habit_learning_rate=5e-3,
    rare_loops=0.5,
    rare_steps=20,
    loop_samples=400,
    sae_latents=64,
    sae_k=4,
    sae_steps=30,
    sae_documents=100,
    scan_samples=8,
    scan_fresh_samples=8,
    scan_random_directions=2,
    strengths=[1.0],
    window_start=[0, 2],
    window_lengths=[8],
    top=2,
    arms=["plain", "default", "paper"],
    seeds=[0],
    updates=2,
    prompts_per_update=2,
    rows_per_prompt=4,
    sampled_problems=30,
    benign_problems=10,
    workers=1,
)


def test_the_chain_runs_once_and_then_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, cache=str(tmp_path))
    first = run_experiment(config)
    assert [result.name for result in first.arms] == ["plain", "paper", "default"]
    assert len(first.world.loops.collection.loops) > 0
    assert set(first.world.saes.explained_variance) == {0, 1}
    steering = first.world.features.load().settings["steering"]
    assert (steering["window_length"], steering["strength"]) == (8, 1.0)
    assert [way.stem for way in sorted(first.world.features.folder.iterdir())] == [TO_END, WINDOW]  # as the arms use
    for result in (first.start, *first.arms):
        run = result.runs[0]
        assert (run.quality.samples, run.benign.samples) == (30, 10)
    assert first.arm("default").runs[0].history[0]["negative/rows"] == 2
    assert "negative/looped" not in first.arm("plain").runs[0].history[0]
    made = sorted(path.name for path in tmp_path.iterdir())

    def never(*arguments: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(runs, "_train", never)
    monkeypatch.setattr(runs, "_evaluate", never)
    second = run_experiment(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == made
    assert [result.runs for result in second.arms] == [result.runs for result in first.arms]

    # Other samples of the same models need no training.
    monkeypatch.undo()
    monkeypatch.setattr(runs, "_train", never)
    more = run_experiment(replace(config, sampled_problems=40))
    assert more.arm("plain").runs[0].quality.samples == 40

    assert [len(table(first).rows) for table in (report.start_table, report.sampled_table)] == [5, 4]
    negatives = report.negatives_table(first)
    assert [row[2] for row in negatives.rows] == [0, 4, 4]
    assert negatives.rows[0][1] == f"{round(_own_loops(first))} of 16"


def _own_loops(experiment: Experiment) -> float:
    history = experiment.arm("plain").runs[0].history
    return sum(8 * entry["ordinary/repeat_ratio"] for entry in history)


def test_the_demo_shows_it_and_writes_what_the_recipe_reads(tmp_path: Path) -> None:
    report = run_demo(None, tmp_path / "demo", replace(TINY, cache=str(tmp_path / "cache")))
    text = report.read_text(encoding="utf-8")
    assert "Endless repetition by method" in text
    assert "steered, default" in text
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert {"repetition_sampled", "negatives", "steering_curve"} <= set(summary["results"]["tables"])
    folder = tmp_path / "demo" / "arithmetic"
    features = FeatureSet.load(folder / "features.safetensors")
    assert features.settings["steering"]["window_length"] == 8
    row = json.loads((folder / "rl.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(row) == {"prompt", "answer"}
    recipe = ["--config", str(ROOT / "recipes/testbed/steered_dapo.yaml"), "--allow-code", "--dry_run"]
    recipe += ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "rl.jsonl")]
    recipe += ["--features", str(folder / "features.safetensors"), "--output_dir", str(tmp_path / "out")]
    assert grpo.run(recipe) == 0
