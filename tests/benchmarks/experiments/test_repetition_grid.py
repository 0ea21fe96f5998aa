"""The grid of repetition runs: its rows from tiny runs, and what a row is made of."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.experiments import repetition_grid
from benchmarks.experiments.arms import REPETITION_ARMS as ARMS
from benchmarks.experiments.probes import ProbedConfig
from benchmarks.experiments.repetition_grid import (
    run_repetition_bases,
)
from benchmarks.experiments.repetition_rows import repetition_rows
from benchmarks.testbed.repetition import experiment as runs
from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.repetition.experiment import steerable
from benchmarks.testbed.repetition.features import WAYS, RepetitionFeatures
from qscope_posttrain.features.steering import SETTINGS_KEY
from qscope_posttrain.report.summary import to_json
from qscope_posttrain.report.tables import Table

TINY = ProbedConfig(
    fewest_operations=1, most_operations=2, answer_tokens=48, hidden_size=32, intermediate_size=48, model_layers=2,
    heads=2, pretraining_batch_size=16, habit_loops=0.6, habit_steps=120, habit_learning_rate=5e-3, rare_loops=0.5,
    rare_steps=20, loop_samples=300, probe_solutions=5, sae_latents=64, sae_k=4, sae_steps=30, sae_documents=100,
    scan_samples=8, scan_fresh_samples=8, scan_random_directions=2, strengths=[1.0], weak_strengths=[0.5],
    window_start=[0, 2], window_lengths=[8], top=2, updates=2, prompts_per_update=2, rows_per_prompt=4, probe_every=1,
    sampled_problems=230, benign_problems=10, workers=1,
)  # fmt: skip


@pytest.mark.slow
def test_the_grid_yields_the_rows_of_each_start_and_runs_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(TINY, cache=str(tmp_path))
    grid = run_repetition_bases(settings, "rare", [0, 3], ["plain", "copied_default", "difference_of_means"], [1])
    found = list(grid)
    assert [world["base"] for _, world in found] == [0, 3]
    rows = [row for own, _ in found for row in own]
    arms = ["start", "plain", "difference_of_means", "copied_default"]
    assert [(row["base"], row["arm"]) for row in rows] == [(base, arm) for base in (0, 3) for arm in arms]
    parsed = repetition_rows(json.loads(json.dumps(to_json(rows))))
    assert {row.seed for row in parsed} == {1}
    start, plain, means, copied = parsed[:4]
    assert (sorted(start.probes), sorted(plain.probes)) == ([0], [0, 1, 2])
    assert start.probes[0] == plain.probes[0] != parsed[4].probes[0]
    assert (start.negatives, plain.negatives, means.negatives, copied.negatives) == (0, 0, 4, 4)
    assert start.gradient_norm is None
    assert plain.gradient_norm is not None
    assert plain.gradient_norm > 0
    assert means.way is not None
    assert copied.way is None

    lines = (Path(plain.folder) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["problem"] for sample in samples] == list(range(200))
    assert set(samples[0]) == {"problem", "prompt", "completion", "loop", "right"}
    assert sum(sample["loop"] for sample in samples) <= plain.quality.loops
    assert sum(sample["right"] for sample in samples) <= plain.quality.right

    world = found[0][1]
    assert set(world["dose"]) == set(WAYS)
    assert Table(**world["dose"]["window_means"]["steering_curve"]).rows
    assert world["left_out"] == []
    assert json.loads(json.dumps(to_json(world)))["own_samples"] == 300

    def never(*arguments: object) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr(runs, "_train", never)
    monkeypatch.setattr(runs, "_evaluate", never)
    again = run_repetition_bases(settings, "rare", [0, 3], ["plain", "copied_default", "difference_of_means"], [1])
    assert [row for own, _ in again for row in own] == rows


def test_which_arms_steer() -> None:
    steered = {name for name, arm in ARMS.items() if arm.steers}
    assert {"paper", "default", "random", "difference_of_means"} <= steered
    assert not steered & {"plain", "seeded", "copied_default", "reward_penalty", "plain_right"}


class _Features(RepetitionFeatures):
    """Feature sets of which some ways have no choice, without files."""

    def __init__(self, chosen: dict[str, dict[str, float]]) -> None:
        super().__init__(Path(), "")
        object.__setattr__(self, "chosen", chosen)

    def way_in_use(self, way: str) -> str:
        return way if way in self.chosen else "window"  # type: ignore[attr-defined]

    def load(self, way: str = "window"):  # type: ignore[no-untyped-def]
        chosen = self.chosen.get(self.way_in_use(way))  # type: ignore[attr-defined]
        settings = {} if chosen is None else {SETTINGS_KEY: chosen}
        return SimpleNamespace(settings=settings)


def test_an_arm_that_has_nothing_to_steer_with_is_left_out() -> None:
    arms = [ARMS[name] for name in ("plain", "paper", "default", "seeded", "random", "difference_of_means")]

    def kept(**chosen: dict[str, float]) -> list[str]:
        return [arm.name for arm in steerable(arms, _Features(chosen))]

    assert kept() == ["plain", "seeded"]
    assert kept(window={"layer": 1}) == [arm.name for arm in arms]
    assert kept(to_end={"layer": 1}) == ["plain", "paper", "seeded"]


def test_the_row_says_along_what_it_was_steered_in_fact() -> None:
    features = _Features({"window": {"layer": 2, "strength": 1.0}})
    steering = repetition_grid._steering(ARMS["difference_of_means"], features)
    assert (steering["asked"], steering["way"], steering["layer"]) == ("window_means", "window", 2)


def test_negatives_are_counted_over_all_updates() -> None:
    history = (
        {"negative/rows": 4.0, "negative/looped": 0.75},
        {"negative/rows": 0.0, "negative/looped": float("nan")},
        {"negative/rows": 4.0, "negative/looped": 0.25},
    )
    assert repetition_grid._negatives(SimpleNamespace(history=history)) == {"rows": 8, "looped": 4}
    assert repetition_grid._negatives(SimpleNamespace(history=({"negative/rows": 0.0},))) is None
    assert repetition_grid._mean([1.0, float("nan"), 3.0]) == 2.0
    assert repetition_grid._mean([]) is None


def test_the_device_decides_where_everything_runs_and_auto_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RepetitionConfig().torch_device() == "cpu"
    for present, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda present=present: present)
        assert RepetitionConfig(device="auto").torch_device() == device
    with pytest.raises(ValueError, match="cpu, cuda or auto"):
        RepetitionConfig(device="gpu")
    assert asdict(RepetitionConfig())["device"] == "cpu"
