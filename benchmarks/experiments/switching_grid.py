"""Runs of a switching experiment: every arm, coefficient and seed on every pretrained model, as rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.experiments.arms import SWITCHING_ARMS as ARMS
from benchmarks.experiments.recipe import SwitchingCell
from benchmarks.testbed.processes import one_thread
from benchmarks.testbed.switching.config import SwitchingConfig
from benchmarks.testbed.switching.experiment import TEST, VALIDATION, Job, make_world, run_jobs
from benchmarks.testbed.switching.language_model import SwitchingModel
from benchmarks.testbed.switching.windows import decode
from qscope_posttrain.evaluation.code_switching import ScriptDetector, SwitchDetector
from qscope_posttrain.evaluation.span_identification import SpanIdentifier, fit_span_identifier
from qscope_posttrain.models.generation import Sample
from qscope_posttrain.report.progress import status
from qscope_posttrain.text.repetition import is_endless_repetition
from qscope_posttrain.text.scripts import contains_script, language_scripts

SPLITS = (VALIDATION, TEST)
"""Coefficients are chosen on the first; everything is reported on the second, whose prompts are sampled."""

_CALIBRATION_WINDOWS = 1200
_CALIBRATION_SEED = 77


def run_switching_cell(cell: SwitchingCell) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The rows of each base model, as they come, with what is known of the model; what is cached is not run again."""
    with one_thread():
        for base in cell.bases:
            status(f"{cell.title}: base model {base}")
            yield _run_base(cell, base)


def cell_jobs(cell: SwitchingCell) -> list[Job]:
    """All runs on one base model: before SFT, SFT, and every arm at every coefficient, for each seed."""
    jobs = []
    for seed in cell.seeds:
        jobs += [Job(None, 0.0, seed, SPLITS), Job(ARMS["sft"], 0.0, seed, SPLITS)]
        jobs += [Job(entry.arm, weight, seed, SPLITS) for entry in cell.arms for weight in entry.weights]
    return jobs


def _run_base(cell: SwitchingCell, base: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    config = replace(cell.settings, model_seed=base, seeds=list(cell.seeds))
    world = make_world(config)
    language_model = world.language_model
    runs = run_jobs(cell_jobs(cell), world, f"{cell.title}, base {base}: fine-tuning and measuring")
    detectors, identification = _detectors(config, language_model)
    rows = [
        {
            "kind": "switching",
            "cell": cell.name,
            "base": base,
            "arm": run.job.method,
            "title": "before SFT" if run.job.arm is None else run.job.arm.title,
            "sae": run.job.arm is not None and run.job.arm.uses_sae,
            "weight": run.job.weight,
            "seed": run.job.seed,
            "target": config.target,
            "identify": config.identify,
            "penalised": config.penalised,
            "metrics": {split: asdict(metrics) for split, metrics in run.measured.items()},
            "sampled": count_switches(run.samples, *detectors),
            "seconds": run.seconds,
            "step_seconds": run.step_seconds,
            "folder": str(run.folder),
        }
        for run in runs
    ]
    about = {
        "cell": cell.name,
        "base": base,
        "loss": sum(language_model.losses[-50:]) / len(language_model.losses[-50:]),
        "explained_variance": world.dictionaries.explained_variance,
        "target_tokens": len(language_model.target_tokens),
        "causal_check": world.feature_sets.causal_table(),
        "identification": identification,
    }
    return rows, about


def count_switches(samples: Sequence[Sample], target: SwitchDetector, any_other: SwitchDetector) -> dict[str, Any]:
    """Responses that switched to the target, to any other language, and that repeat without end."""
    by_language: dict[str, dict[str, int]] = {}
    for sample in samples:
        counts = by_language.setdefault(sample.language, {"prompts": 0, "target": 0, "any": 0})
        counts["prompts"] += 1
        counts["target"] += target(sample.response, sample.language)
        counts["any"] += any_other(sample.response, sample.language)
    total = {name: sum(counts[name] for counts in by_language.values()) for name in ("prompts", "target", "any")}
    endless = sum(is_endless_repetition(sample.tokens, ended=sample.ended) for sample in samples)
    return {**total, "endless": endless, "languages": by_language}


def _detectors(
    config: SwitchingConfig, language_model: SwitchingModel
) -> tuple[tuple[SwitchDetector, SwitchDetector], Mapping[str, Any] | None]:
    """Whether a response holds the target, whether it holds any other language, and how the second is known."""
    if config.identify == "words":
        identifier = fit_identifier(config, language_model)
        return (identifier.switched, identifier.switched), identifier.to_dict()
    scripts = {script for language in language_model.languages for script in language_scripts(language)} - {"Latin"}

    def any_other(response: str, language: str, /) -> bool:
        foreign = scripts - set(language_scripts(language))
        return any(contains_script(response, script) for script in foreign)

    return (ScriptDetector(config.target), any_other), None


def fit_identifier(config: SwitchingConfig, language_model: SwitchingModel) -> SpanIdentifier:
    """Learns words from the pretraining text and its thresholds from clean validation text of a response's length."""
    tokenizer, maker = language_model.tokenizer, language_model.maker
    texts = {
        name: [decode(tokenizer, piece) for piece in torch.from_numpy(text.tokens).split(config.window)]
        for name, text in maker.encoded["pre"].items()
    }
    calibration: dict[str, list[str]] = {name: [] for name in language_model.sources}
    count = _CALIBRATION_WINDOWS * len(language_model.sources)
    windows = maker.dialogue(VALIDATION, count, _CALIBRATION_SEED, languages=language_model.sources)
    last = windows.prompt_length + config.sampled_tokens
    for language, row in zip(windows.languages, windows.input_ids, strict=True):
        calibration[language].append(decode(tokenizer, row[windows.prompt_length : last], special=False))
    return fit_span_identifier(texts, config.target, calibration)
