"""The whole chain in miniature: mechanics only, no headline numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.experiments.arms import SWITCHING_ARMS as ARMS
from benchmarks.testbed.cache import open_cache
from benchmarks.testbed.demo import run_demo
from benchmarks.testbed.switching.config import ARMS as DEMO_ARMS
from benchmarks.testbed.switching.config import SwitchingConfig
from benchmarks.testbed.switching.experiment import Experiment, Job, execute, run_experiment, run_jobs


@pytest.fixture(scope="module")
def experiment(small_config: SwitchingConfig) -> Experiment:
    return run_experiment(small_config)


def test_the_model_learns_the_text_and_the_habit(experiment: Experiment) -> None:
    model = experiment.world.language_model
    assert model.losses[-1] < 0.7 * model.losses[0]
    metrics = experiment.base.metrics
    assert metrics.ppl < 0.3 * len(model.tokenizer)
    # The trained hazard is .3 over the places where a switch may fall.
    assert 0.002 < metrics.hz < 0.1
    assert 0.05 < metrics.csx < 0.9


def test_dictionaries_come_back_from_qwen_scope_files(experiment: Experiment) -> None:
    dictionaries = experiment.world.dictionaries
    assert sorted(dictionaries.saes) == [0, 1]
    for layer, sae in dictionaries.saes.items():
        assert sae.source.location.endswith(f"layer{layer}.sae.pt") or str(dictionaries.folder) in sae.source.location
        assert dictionaries.explained_variance[layer] > 0.6


def test_target_features_fire_on_the_target(experiment: Experiment) -> None:
    features = experiment.world.feature_sets.load("sae")
    best = features.select(language="zh", layers=[1], top=1).layers[1]
    rates = dict(zip(features.languages, best.firing_rate[:, 0].tolist(), strict=True))
    assert rates["zh"] > 2 * max(rates["en"], rates["ru"])


def test_every_method_ran_on_the_same_prompts_and_data(experiment: Experiment) -> None:
    assert [result.name for result in experiment.methods] == list(DEMO_ARMS)
    steps = experiment.config.sft_windows // experiment.config.sft_batch_size
    prompts = [sample.prompt for sample in experiment.base.switching.samples]
    for result in experiment.methods:
        assert [sample.prompt for sample in result.switching.samples] == prompts
        assert all(len(run.history) == steps for run in result.runs)
        assert 0 <= result.switching.ratio <= 1
    losses = {name: experiment.method(name).runs[0].history[0]["loss"] for name in ("sft", "random_features")}
    assert losses["sft"] > 0


@pytest.mark.parametrize("name", [name for name in DEMO_ARMS if ARMS[name].uses_features])
def test_the_penalty_falls(experiment: Experiment, name: str) -> None:
    history = experiment.method(name).runs[0].history
    penalties = [entry["sasft/penalty"] for entry in history]
    assert sum(penalties[-4:]) < sum(penalties[:4])


@pytest.mark.parametrize("name", ["difference_of_means", "sasft_combined", "token_penalty"])
def test_the_hazard_falls_against_sft(experiment: Experiment, name: str) -> None:
    assert experiment.method(name).metrics.hz < 0.95 * experiment.method("sft").metrics.hz


def test_fine_tuning_leaves_the_start_alone(experiment: Experiment, small_config: SwitchingConfig) -> None:
    model = experiment.world.language_model.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    execute(
        Job(ARMS["sasft_decoder"], 0.5, 1, ("val",), sample=False), small_config, experiment.world.language_model,
        experiment.world.feature_sets,
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


OTHERS = [name for name in ARMS if name not in DEMO_ARMS]
OFTEN = ("sasft_token", "gradient")
"""Between them both penalties, and rows of no other method; what the rest add is tested where it is made."""


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_other_methods_run_and_lower_what_they_are_to_lower(
    experiment: Experiment, small_config: SwitchingConfig, name: str
) -> None:
    arm = ARMS[name]
    job = Job(arm, arm.weight, 1, ("val", "test"), sample=False)
    run = execute(job, small_config, experiment.world.language_model, experiment.world.feature_sets)
    assert set(run["measured"]) == {"val", "test"}
    hazard, plain = run["measured"]["test"]["hz"], experiment.method("sft").metrics.hz
    assert hazard < 0.97 * plain if arm.penalty != "none" else hazard == plain  # clean data: nothing to drop


def test_rows_with_the_habit_are_dropped_and_a_language_without_penalty_keeps_its_hazard(
    experiment: Experiment, small_config: SwitchingConfig
) -> None:
    config = replace(small_config, sft_switch=0.4, penalised=["ru"])
    world = (experiment.world.language_model, experiment.world.feature_sets)
    kept = execute(Job(ARMS["sft_dropped"], 0.0, 1, ("test",), sample=False), config, *world)
    everything = execute(Job(ARMS["sft"], 0.0, 1, ("test",), sample=False), config, *world)
    assert len(kept["history"]) < len(everything["history"])
    token = execute(Job(ARMS["token_dropped"], 60.0, 1, ("test",), sample=False), config, *world)
    fall = {
        language: token["measured"]["test"]["hz_by_language"][language]
        / kept["measured"]["test"]["hz_by_language"][language]
        for language in ("en", "ru")
    }
    assert fall["ru"] < 0.8 * fall["en"]


def test_plain_sft_may_come_first(experiment: Experiment, small_config: SwitchingConfig) -> None:
    world = (experiment.world.language_model, experiment.world.feature_sets)
    job = Job(ARMS["sft"], 0.0, 1, ("test",), sample=False)
    config = replace(small_config, prior_windows=64)
    later = execute(job, config, *world)
    assert later["history"][0]["loss"] != execute(job, small_config, *world)["history"][0]["loss"]
    # What is measured is the model after the second fine-tuning, not the one after the first, which all methods share.
    penalised = execute(Job(ARMS["token_penalty"], 50.0, 1, ("test",), sample=False), config, *world)
    assert penalised["measured"]["test"]["hz"] < 0.9 * later["measured"]["test"]["hz"]


def test_a_second_run_trains_nothing_and_agrees(
    experiment: Experiment, small_config: SwitchingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was trained again")

    for place in ("language_model.pretrain", "features.train_dictionaries", "experiment.fine_tune"):
        monkeypatch.setattr(f"benchmarks.testbed.switching.{place}", refuse)
    again = run_experiment(small_config)
    assert [result.metrics for result in again.methods] == [result.metrics for result in experiment.methods]
    assert [result.switching.switched for result in again.methods] == [
        result.switching.switched for result in experiment.methods
    ]


@pytest.mark.slow  # two processes import torch and trl
def test_processes_agree_with_one_process(
    experiment: Experiment, small_config: SwitchingConfig, tmp_path: Path
) -> None:
    jobs = [Job(ARMS[name], ARMS[name].weight, 1, ("test",)) for name in ("sft", "difference_of_means")]
    config = replace(small_config, workers=2, cache=str(tmp_path))
    runs = run_jobs(jobs, replace(experiment.world, config=config, cache=open_cache(config)), "in two processes")
    for run in runs:
        assert run.metrics == experiment.method(run.job.method).runs[0].metrics


def test_tuning_stays_within_its_budget(experiment: Experiment, small_config: SwitchingConfig) -> None:
    tuned = run_experiment(
        replace(
            small_config, tune=True, tune_budget=0.01, arms=["difference_of_means"], sft_windows=96, sampled_prompts=6
        )
    )
    assert tuned.tuning is not None
    grid = ARMS["difference_of_means"].grid
    rows = tuned.tuning.rows
    assert [row[1] for row in rows] == list(grid)
    affordable = [row for row in rows if float(str(row[3])) <= 1.0] or [min(rows, key=lambda row: float(str(row[3])))]
    expected = min(affordable, key=lambda row: float(str(row[2])))
    assert tuned.method("difference_of_means").weight == expected[1]
    assert [row[4] for row in rows].count(True) == 1


def test_the_demo_writes_one_folder_with_everything(
    experiment: Experiment, small_config: SwitchingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_demo(small_config, tmp_path / "demo")
    folder = report.parent
    page = report.read_text(encoding="utf-8")
    for arm in (ARMS[name] for name in DEMO_ARMS):
        assert arm.title in page
        assert arm.title in capsys.readouterr().out or arm.name != "sft"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["results"]["methods"]) == {"base", *DEMO_ARMS}
    assert summary["results"]["methods"]["sft"]["metrics"]["hz"] == experiment.method("sft").metrics.hz
    lines = [json.loads(line) for line in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == (1 + len(DEMO_ARMS)) * small_config.sampled_prompts
    for name in ("model/model.safetensors", "sae/layer1.sae.pt", "features.safetensors", "texts/ru.txt"):
        assert (folder / name).is_file(), name
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == small_config.sft_windows
    assert all(row["prompt"].endswith("<sep>") and row["completion"] and row["language"] for row in rows)


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    small_config: SwitchingConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot write to the output folder"):
        run_demo(small_config, tmp_path / "file")
