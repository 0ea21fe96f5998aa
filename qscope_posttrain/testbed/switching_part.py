"""The demo's first half: SASFT and its controls on a small multilingual model that switches languages."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qscope_posttrain.report.tables import Table
from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.demo_part import DemoPart
from qscope_posttrain.testbed.experiment import Experiment, MethodResult, run_experiment
from qscope_posttrain.testbed.export import export_testbed
from qscope_posttrain.testbed.report_page import build_sections
from qscope_posttrain.testbed.tables import firing_table, forced_table, model_table, sampled_table, seeds_table

EXAMPLES = "examples.jsonl"


def run_switching(config: TestbedConfig, folder: Path) -> DemoPart:
    """Run the chain, print its tables, and write examples and artefacts into `folder`."""
    experiment = run_experiment(config)
    features = experiment.feature_sets.load("sae")
    tables = {
        "model": model_table(experiment),
        "features": firing_table(features, config.tapped_layers[-1]),
        "causal_check": Table(**experiment.feature_sets.causal_table()),
    }
    if experiment.tuning is not None:
        tables["tuning"] = experiment.tuning
    tables["sampled"] = sampled_table(experiment)
    tables["teacher_forced"] = forced_table(experiment)
    for table in tables.values():
        table.print()
    tables["runs"] = seeds_table(experiment)
    examples = _write_examples(folder / EXAMPLES, experiment)
    results = {
        "methods": {result.name: _method(result) for result in (experiment.base, *experiment.methods)},
        "explained_variance": experiment.dictionaries.explained_variance,
        "examples": examples,
    }
    return DemoPart(
        sections=build_sections(experiment, features, tables),
        tables=tables,
        results=results,
        artefacts=export_testbed(experiment, folder),
        seeds=tuple(config.seeds),
    )


def _method(result: MethodResult) -> dict[str, Any]:
    """JSON-ready numbers of one method."""
    return {
        "title": result.title,
        "weight": result.weight,
        "switching": result.switching.to_dict(),
        "metrics": asdict(result.metrics),
        "runs": [
            {
                "seed": run.job.seed,
                "switched": ratio,
                "metrics": asdict(run.metrics),
                "seconds": run.seconds,
                "step_seconds": run.step_seconds,
                "history": run.history,
            }
            for run, ratio in zip(result.runs, result.ratio_per_seed, strict=True)
        ],
    }


def _write_examples(path: Path, experiment: Experiment) -> Path:
    """Every response of every method and seed as one line of JSON."""
    with path.open("w", encoding="utf-8") as file:
        for result in (experiment.base, *experiment.methods):
            for sample, switched in zip(result.switching.samples, result.switching.switched, strict=True):
                entry = {
                    "method": result.name,
                    "seed": experiment.config.seeds[sample.sample_index],
                    "language": sample.language,
                    "prompt_index": sample.prompt_index,
                    "prompt": sample.prompt,
                    "response": sample.response,
                    "switched": switched,
                }
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return path
