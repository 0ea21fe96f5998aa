"""The demo's second half: DAPO with and without steered negatives on a small model that seldom repeats itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qscope_posttrain.report.tables import Table
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.dictionaries import TO_END, WINDOW
from qscope_posttrain.testbed.arithmetic.experiment import ArmResult, run_arithmetic
from qscope_posttrain.testbed.arithmetic.export import export_arithmetic
from qscope_posttrain.testbed.arithmetic.report_page import build_arithmetic_sections
from qscope_posttrain.testbed.arithmetic.tables import (
    negatives_table,
    probe_table,
    runs_table,
    sampled_table,
    start_table,
)
from qscope_posttrain.testbed.demo_part import DemoPart


def run_repetition(config: ArithmeticConfig, folder: Path) -> DemoPart:
    """Run the chain, print its tables, and write model, SAEs, features and data into `folder`."""
    experiment = run_arithmetic(config)
    features = experiment.features.load()
    tables = {
        "repetition_start": start_table(experiment),
        "repetition_features": features.to_table(),
        "steering_curve": Table(**experiment.features.tables(WINDOW)["steering_curve"]),
        "steering_curve_to_end": Table(**experiment.features.tables(TO_END)["steering_curve"]),
        "repetition_sampled": sampled_table(experiment),
        "repetition_probes": probe_table(experiment),
        "negatives": negatives_table(experiment),
    }
    for name, table in tables.items():
        if not name.startswith("steering_curve"):
            table.print()
    tables["repetition_runs"] = runs_table(experiment)
    results = {
        "repetition_arms": {result.name: _arm(result) for result in (experiment.start, *experiment.arms)},
        "steering": features.settings["steering"],
    }
    places = export_arithmetic(experiment, folder)
    return DemoPart(
        sections=build_arithmetic_sections(experiment, tables),
        tables=tables,
        results=results,
        artefacts={f"arithmetic_{name}": place for name, place in places.items()},
        seeds=tuple(config.seeds),
    )


def _arm(result: ArmResult) -> dict[str, Any]:
    """JSON-ready numbers of one arm."""
    return {
        "title": result.title,
        "loop_rate": result.loop_rate,
        "accuracy": result.accuracy,
        "runs": [
            {
                "seed": run.job.seed,
                "quality": asdict(run.quality),
                "benign": asdict(run.benign),
                "probes": {step: asdict(probes) for step, probes in run.probes.items()},
                "history": run.history,
                "seconds": run.seconds,
            }
            for run in result.runs
        ],
    }
