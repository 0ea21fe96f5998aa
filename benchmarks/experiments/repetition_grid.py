"""Runs of a repetition experiment: every arm and seed from every start checkpoint, as rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.experiments.arms import REPETITION_ARMS as ARMS
from benchmarks.experiments.probes import ProbedConfig, Probing
from benchmarks.experiments.repetition_rows import KIND
from benchmarks.testbed.processes import one_thread
from benchmarks.testbed.repetition.config import PLAIN, Arm
from benchmarks.testbed.repetition.experiment import START, Run, World, make_world, run_arms, steerable
from benchmarks.testbed.repetition.features import WAYS, RepetitionFeatures
from qscope_posttrain.features.steering import SETTINGS_KEY
from qscope_posttrain.report.progress import status

_UNLIKELY = "negative/unlikely_tokens"


def run_repetition_bases(
    settings: ProbedConfig, cell: str, bases: Sequence[int], arms: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Train with every arm and seed from the start checkpoint of each base, one base after the other.

    What is in the cache is not run again, so an experiment that was cut off goes on where it was. An arm that steers is
    left out for a base in which no feature made the model loop, which is said, and stands in `left_out` of its world.

    Args:
        settings: of everything; `model_seed`, `arms` and `seeds` are replaced.
        cell: name of the regime, for the rows.
        bases: seeds of start checkpoints: of model, documents, SAEs and own loops.
        arms: names in `ARMS`; plain DAPO always runs.
        seeds: of training, on every base.

    Yields:
        For each base the rows of its runs, the start model's ("start", once a seed) among them, and its world: JSON
        values on the start model, its own loops, its SAEs, and its dose curves (`dose`: way to steer -> table name ->
        `Table.to_dict()`).
    """
    for base in bases:
        status(f"{cell}: start checkpoint {base}")
        config = replace(settings, model_seed=base, seeds=list(seeds))
        with one_thread():
            world = make_world(config)
            wanted = [arm for name, arm in ARMS.items() if name == PLAIN or name in arms]
            kept = steerable(wanted, world.features)
            watch = Probing(config.probe_every, config.probe_solutions)
            experiment = run_arms(world, kept, watch)
        rows = [
            _row(run, result.title, cell, base, world.features)
            for result in (experiment.start, *experiment.arms)
            for run in result.runs
        ]
        yield rows, _world(world, cell, base, [arm.name for arm in wanted if arm not in kept])


def _chosen(arm: Arm, features: RepetitionFeatures) -> Mapping[str, Any] | None:
    chosen: Mapping[str, Any] | None = features.load(arm.steering).settings.get(SETTINGS_KEY)
    return chosen


def _row(run: Run, title: str, cell: str, base: int, features: RepetitionFeatures) -> dict[str, Any]:
    name = run.job.method
    return {
        "kind": KIND,
        "cell": cell,
        "base": base,
        "arm": name,
        "title": title,
        "weight": None,
        "seed": run.job.seed,
        "quality": asdict(run.quality),
        "benign": asdict(run.benign),
        "probes": {str(step): dict(probes) for step, probes in run.watched.items()},
        "steered": _negatives(run),
        "gradient_norm": _mean([entry["grad_norm"] for entry in run.history if "grad_norm" in entry]),
        "unlikely_tokens": _mean([entry[_UNLIKELY] for entry in run.history if _UNLIKELY in entry]),
        "steering": None if name == START or not ARMS[name].steers else _steering(ARMS[name], features),
        "seconds": run.seconds,
        "folder": str(run.folder),
    }


def _negatives(run: Run) -> dict[str, int] | None:
    """Negatives over all updates, however they were made, and those of them that repeat without end."""
    rows = looped = 0
    for entry in run.history:
        count = round(entry.get("negative/rows", 0.0))
        rows += count
        looped += round(count * entry.get("negative/looped", 0.0)) if count else 0
    return {"rows": rows, "looped": looped} if rows else None


def _steering(arm: Arm, features: RepetitionFeatures) -> dict[str, Any]:
    """Where and how strongly the arm was steered; `way` is the one in use, which may not be the one asked for."""
    names = ("layer", "strength", "window_start", "window_length", "specific", "own_looped", "own_random")
    chosen = _chosen(arm, features) or {}
    return {
        "asked": arm.steering,
        "way": features.way_in_use(arm.steering),
        **{name: chosen.get(name) for name in names},
    }


def _world(start: World, cell: str, base: int, left_out: Sequence[str]) -> dict[str, Any]:
    losses, loops = start.language_model.losses[-50:], start.loops.collection
    return {
        "kind": KIND,
        "cell": cell,
        "base": base,
        "parameters": sum(parameter.numel() for parameter in start.language_model.model.parameters()),
        "loss": sum(losses) / len(losses),
        "own_loops": len(loops.loops),
        "own_samples": loops.samples,
        "explained_variance": {str(layer): value for layer, value in start.saes.explained_variance.items()},
        "steering": {way: start.features.load(way).settings.get(SETTINGS_KEY) for way in WAYS},
        "way_in_use": {way: start.features.way_in_use(way) for way in WAYS},
        "dose": {way: {name: table.to_dict() for name, table in start.features.tables(way).items()} for way in WAYS},
        "left_out": list(left_out),
    }


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
