"""The experiment: choose weights on validation prompts if asked to, then every method and seed on test prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qscope_posttrain.evaluation.code_switching import SwitchingResult, switching_ratio
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.testbed.arms import ARMS
from qscope_posttrain.testbed.cache import Cache, open_cache
from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.dictionaries import (
    Dictionaries,
    FeatureSets,
    make_dictionaries,
    make_feature_sets,
)
from qscope_posttrain.testbed.language_model import LanguageModel, make_language_model
from qscope_posttrain.testbed.metrics import Metrics, mean_metrics
from qscope_posttrain.testbed.runs import BASE, TEST, VALIDATION, Job, Run, run_jobs

SFT = "sft"
"""The method with which all others are compared."""


@dataclass(frozen=True)
class MethodResult:
    """One method over all seeds."""

    name: str
    title: str
    weight: float
    runs: tuple[Run, ...]
    """One a seed."""
    switching: SwitchingResult
    """All seeds' responses together: one sample of a prompt per seed."""

    @property
    def metrics(self) -> Metrics:
        """Means over the seeds."""
        return mean_metrics([run.metrics for run in self.runs])

    @property
    def ratio_per_seed(self) -> tuple[float, ...]:
        """Share of responses that switched, one number a seed."""
        return tuple(switching_ratio(run.samples, self.switching.target).ratio for run in self.runs)


@dataclass(frozen=True)
class Experiment:
    """Everything that a report needs."""

    config: TestbedConfig
    language_model: LanguageModel
    dictionaries: Dictionaries
    feature_sets: FeatureSets
    base: MethodResult
    """The pretrained model before any fine-tuning."""
    methods: tuple[MethodResult, ...]
    """In the order of `ARMS`; the first is plain SFT."""
    tuning: Table | None
    """What each weight gave on validation prompts; None if the recorded weights were taken."""

    def method(self, name: str) -> MethodResult:
        """One method by name."""
        return next(result for result in self.methods if result.name == name)


def run_experiment(config: TestbedConfig) -> Experiment:
    """Run the chain; what is in the cache is not made again."""
    cache = open_cache(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        language_model = make_language_model(config, cache)
        dictionaries = make_dictionaries(config, cache, language_model)
        feature_sets = make_feature_sets(config, cache, language_model, dictionaries)
        names = [name for name in ARMS if name in config.arms or name == SFT]
        weights = {name: ARMS[name].weight for name in names}
        tuning = None
        if config.tune:
            weights, tuning = choose_weights(names, config, cache, language_model, feature_sets)
        jobs = [Job(None, 0.0, seed, (TEST,)) for seed in config.seeds]
        jobs += [Job(ARMS[name], weights[name], seed, (TEST,)) for seed in config.seeds for name in names]
        runs = run_jobs(jobs, config, cache, language_model, feature_sets, "fine-tuning and evaluating")
    finally:
        torch.set_num_threads(threads)
    return Experiment(
        config=config,
        language_model=language_model,
        dictionaries=dictionaries,
        feature_sets=feature_sets,
        base=_gather(BASE, "before SFT", runs, config),
        methods=tuple(_gather(name, ARMS[name].title, runs, config) for name in names),
        tuning=tuning,
    )


def choose_weights(
    names: Sequence[str],
    config: TestbedConfig,
    cache: Cache,
    language_model: LanguageModel,
    feature_sets: FeatureSets,
) -> tuple[dict[str, float], Table]:
    """The weight of every method that lowers the hazard most on validation windows within the perplexity budget.

    Among the weights of an arm's grid whose masked perplexity is at most `tune_budget` above SFT's, the one with the
    lowest hazard; if all are dearer, the cheapest. Random features take the weight of the readout that they control.
    """
    pairs = [(name, weight) for name in names for weight in ARMS[name].grid]
    jobs = [Job(ARMS[SFT], 0.0, config.tune_seed, (VALIDATION,), sample=False)]
    jobs += [Job(ARMS[name], weight, config.tune_seed, (VALIDATION,), sample=False) for name, weight in pairs]
    runs = run_jobs(jobs, config, cache, language_model, feature_sets, "choosing weights on validation prompts")
    reference = runs[0].metrics
    chosen = {name: ARMS[name].weight for name in names}
    for name in dict.fromkeys(name for name, _ in pairs):
        candidates = [run for run in runs[1:] if run.job.method == name]
        affordable = [run for run in candidates if _cost(run.metrics, reference) <= config.tune_budget]
        best = (
            min(affordable, key=lambda run: run.metrics.hz)
            if affordable
            else min(candidates, key=lambda run: run.metrics.masked_ppl)
        )
        chosen[name] = best.job.weight
    if "random_features" in chosen and "sasft_decoder" in chosen:
        chosen["random_features"] = chosen["sasft_decoder"]
    rows: list[list[Cell]] = [
        [
            ARMS[run.job.method].title,
            run.job.weight,
            100 * (run.metrics.hz / reference.hz - 1),
            100 * _cost(run.metrics, reference),
            run.job.weight == chosen[run.job.method],
        ]
        for run in runs[1:]
    ]
    columns = ["method", "weight", "hazard, %", "masked perplexity, %", "chosen"]
    caption = (
        f"Change against SFT, seed {config.tune_seed}; budget {100 * config.tune_budget:g} % of masked perplexity."
    )
    return chosen, Table("Weights on validation prompts", columns, rows, caption)


def _cost(metrics: Metrics, reference: Metrics) -> float:
    """Relative rise of masked perplexity."""
    return metrics.masked_ppl / reference.masked_ppl - 1


def _gather(name: str, title: str, runs: Sequence[Run], config: TestbedConfig) -> MethodResult:
    own = tuple(run for run in runs if run.job.method == name)
    samples = [replace(sample, sample_index=index) for index, run in enumerate(own) for sample in run.samples]
    settings = {
        "samples_per_prompt": len(own),
        "temperature": config.temperature,
        "top_p": 1.0,
        "max_new_tokens": config.sampled_tokens,
        "seeds": list(config.seeds),
    }
    return MethodResult(name, title, own[0].job.weight, own, switching_ratio(samples, config.target, settings))
