"""The main command: the whole chain on a tiny model, from text to a model that switches less, with a report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qscope_posttrain.report.html import write_html
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.report.tables import Table
from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.experiment import Experiment, MethodResult, run_experiment
from qscope_posttrain.testbed.export import export_testbed
from qscope_posttrain.testbed.report_page import build_sections, facts
from qscope_posttrain.testbed.tables import firing_table, forced_table, model_table, sampled_table, seeds_table

EXAMPLES = "examples.jsonl"
REPORT = "report.html"


def run_demo(config: TestbedConfig, output: str | Path) -> Path:
    """Run the chain, print its tables, and write everything into `output`; returns the path of the report.

    Written: `report.html`, `summary.json`, `examples.jsonl` (every sampled response of every method), and what the
    other commands read (see `testbed.export`).

    Raises:
        ValueError: the folder cannot be written, or settings that cannot work.
        FileNotFoundError: a corpus that is not there.
    """
    folder = writable_folder(output)
    started = time.monotonic()
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
    status("writing the report")
    examples = _write_examples(folder / EXAMPLES, experiment)
    places = export_testbed(experiment, folder)
    sections = build_sections(experiment, features, tables)
    seconds = time.monotonic() - started
    report = write_html(
        folder / REPORT,
        "SASFT on a tiny world",
        sections,
        "A language model that switches to another language unasked, its sparse autoencoder, and what training "
        "against its features does, next to controls.",
        facts(experiment, seconds),
    )
    results = {
        "seconds": seconds,
        "tables": tables,
        "methods": {result.name: _method(result) for result in (experiment.base, *experiment.methods)},
        "explained_variance": experiment.dictionaries.explained_variance,
        "artefacts": {name: str(place) for name, place in places.items()},
        "examples": examples,
        "report": report,
    }
    write_summary(folder, "demo", asdict(config), results)
    status(f"{seconds:.0f} s; the report is {report}")
    return report


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
