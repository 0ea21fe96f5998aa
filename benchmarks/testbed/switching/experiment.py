"""The experiment: choose weights on validation prompts if asked to, then run every method and seed on test prompts."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.testbed.cache import Artefact, Cache, open_cache, run_missing
from benchmarks.testbed.models import Dictionaries
from benchmarks.testbed.processes import one_thread
from benchmarks.testbed.sampling import SmallModelSampler
from benchmarks.testbed.switching.config import ARMS, SFT, Arm, SwitchingConfig
from benchmarks.testbed.switching.features import RANDOM_DRAWS, FeatureSets, make_dictionaries, make_feature_sets
from benchmarks.testbed.switching.language_model import SwitchingModel, load_switching_model, make_language_model
from benchmarks.testbed.switching.training import Metrics, fine_tune, mean_metrics, teacher_forced_metrics
from benchmarks.testbed.switching.windows import decode
from qscope_posttrain.evaluation.code_switching import SwitchingResult, switching_ratio
from qscope_posttrain.models.generation import Sample, SamplingSettings
from qscope_posttrain.report.tables import Cell, Table

BASE = "base"
"""Name of the run without fine-tuning."""
VALIDATION, TEST = "val", "test"

RUN_VERSION = "1"  # raise it when the same settings would give another run: fine-tuning, penalties, metrics, sampling
_SETTINGS = (
    "sft_windows", "sft_batch_size", "sft_learning_rate", "sft_switch", "prior_windows", "penalised",
    "evaluation_windows", "sampled_prompts", "sampled_tokens", "temperature", "window", "prompt",
)  # fmt: skip
_EVALUATION_SEED, _SAMPLING_SEED, _PRIOR_SEED = 31, 1000, 50_000
_SAMPLING_BATCH = 128


@dataclass(frozen=True)
class Job:
    """One run: a method with a weight and a seed, or (`arm` None) the model before fine-tuning.

    It is measured on the windows of `splits`, and with `sample` it answers the prompts of the last of them.
    """

    arm: Arm | None
    weight: float
    seed: int
    splits: tuple[str, ...]
    sample: bool = True

    @property
    def method(self) -> str:
        """Name of the arm, or `base`."""
        return BASE if self.arm is None else self.arm.name

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the result, as JSON values."""
        return {**vars(self), "arm": {} if self.arm is None else self.arm.to_dict()}


@dataclass(frozen=True)
class Run:
    """The result of a job."""

    job: Job
    measured: Mapping[str, Metrics]
    """By split."""
    samples: tuple[Sample, ...]
    history: tuple[Mapping[str, float], ...]
    """The trainer's log, one entry per step."""
    seconds: float
    step_seconds: float
    """Wall time of training, and the median of its steps."""
    folder: Path

    @property
    def metrics(self) -> Metrics:
        """On the last split of the job."""
        return self.measured[self.job.splits[-1]]


@dataclass(frozen=True)
class World:
    """The pretrained model and what is found in it, which all runs share."""

    config: SwitchingConfig
    cache: Cache
    language_model: SwitchingModel
    dictionaries: Dictionaries
    feature_sets: FeatureSets


@dataclass(frozen=True)
class MethodResult:
    """One method over all seeds."""

    name: str
    title: str
    weight: float
    runs: tuple[Run, ...]
    """One per seed."""
    switching: SwitchingResult
    """All seeds' responses together: one sample of a prompt per seed."""

    @property
    def metrics(self) -> Metrics:
        """Means over the seeds."""
        return mean_metrics([run.metrics for run in self.runs])

    @property
    def ratio_per_seed(self) -> tuple[float, ...]:
        """Share of responses that switched, one number per seed."""
        return tuple(switching_ratio(run.samples, self.switching.target).ratio for run in self.runs)


@dataclass(frozen=True)
class Experiment:
    """Everything that a report needs."""

    world: World
    base: MethodResult
    methods: tuple[MethodResult, ...]
    """In the order of `ARMS`; the first is plain SFT, `base` the model before it."""
    tuning: Table | None
    """Weights on validation prompts; None if the recorded weights were taken."""

    @property
    def config(self) -> SwitchingConfig:
        return self.world.config

    def method(self, name: str) -> MethodResult:
        """Return one method by name."""
        return next(result for result in self.methods if result.name == name)


def make_world(config: SwitchingConfig) -> World:
    """Pretrain the model, train its SAEs and find features, or take them from the cache."""
    cache = open_cache(config)
    language_model = make_language_model(config, cache)
    dictionaries = make_dictionaries(config, cache, language_model)
    return World(
        config, cache, language_model, dictionaries, make_feature_sets(config, cache, language_model, dictionaries)
    )


def run_experiment(config: SwitchingConfig) -> Experiment:
    """Run the whole chain; what is in the cache is not made again."""
    with one_thread():
        world = make_world(config)
        names = [name for name in ARMS if name in config.arms or name == SFT]
        weights, tuning = choose_weights(names, world) if config.tune else ({n: ARMS[n].weight for n in names}, None)
        jobs = [Job(None, 0.0, seed, (TEST,)) for seed in config.seeds]
        jobs += [Job(ARMS[name], weights[name], seed, (TEST,)) for seed in config.seeds for name in names]
        runs = run_jobs(jobs, world, "fine-tuning and evaluating")
    return Experiment(
        world,
        _gather(BASE, "before SFT", runs, config),
        tuple(_gather(name, ARMS[name].title, runs, config) for name in names),
        tuning,
    )


def run_jobs(jobs: Sequence[Job], world: World, description: str) -> list[Run]:
    """Run the jobs that are not in the cache, in `config.workers` processes; return the results in their order.

    The result of a job does not depend on the number of processes.
    """
    places = [_place(job, world) for job in jobs]
    model, features = (Artefact(part.folder, part.key) for part in (world.language_model, world.feature_sets))
    work = functools.partial(_run_in_cache, world.config, world.cache, model, features)
    run_missing(world.cache, dict(zip(places, jobs, strict=True)), work, world.config.workers, description)
    return [_load(job, place.folder) for job, place in zip(jobs, places, strict=True)]


def execute(
    job: Job, config: SwitchingConfig, language_model: SwitchingModel, feature_sets: FeatureSets
) -> dict[str, Any]:
    """Run one job in this process, without the cache; return the fields of `Run` as JSON values, but job and folder."""
    model = language_model.model
    history: tuple[Mapping[str, float], ...] = ()
    seconds = step_seconds = 0.0
    if job.arm is not None:
        arm, start = job.arm, None
        if config.prior_windows:
            start = fine_tune(
                language_model, ARMS[SFT], 0.0, None, config, _PRIOR_SEED + job.seed, windows=config.prior_windows
            ).model
        rows = f"random-{job.seed % RANDOM_DRAWS}" if arm.rows == "random" else arm.rows
        features = feature_sets.load(rows) if arm.uses_features else None
        tuned = fine_tune(language_model, arm, job.weight, features, config, job.seed, start=start)
        model, history, seconds, step_seconds = tuned.model, tuned.history, tuned.seconds, tuned.step_seconds
    maker, count = language_model.maker, config.evaluation_windows
    measured = {}
    for split in job.splits:  # the same windows for all methods and seeds
        windows = maker.dialogue(split, count, _EVALUATION_SEED)
        switching = maker.dialogue(split, max(1, count // 2), _EVALUATION_SEED + 2, 1.0, language_model.sources)
        metrics = teacher_forced_metrics(model, windows, switching, config.target, language_model.target_tokens)
        measured[split] = asdict(metrics)
    samples = _sample(job, config, language_model, model) if job.sample else []
    return {
        "measured": measured,
        "samples": [asdict(sample) for sample in samples],
        "history": history,
        "seconds": seconds,
        "step_seconds": step_seconds,
    }


def _sample(job: Job, config: SwitchingConfig, language_model: SwitchingModel, model: Any) -> list[Sample]:
    """Draw one response to each prompt; prompts are the same for all methods and seeds."""
    maker, tokenizer = language_model.maker, language_model.tokenizer
    windows = maker.dialogue(
        job.splits[-1], config.sampled_prompts, _EVALUATION_SEED + 1, languages=language_model.sources
    )
    prompts = windows.prompts.tolist()
    settings = SamplingSettings(
        samples_per_prompt=1,
        temperature=config.temperature,
        top_p=1.0,
        max_new_tokens=config.sampled_tokens,
        seed=_SAMPLING_SEED + job.seed,
        batch_size=_SAMPLING_BATCH,
    )
    completions = SmallModelSampler(model).sample(prompts, settings)
    seen: dict[str, int] = {}
    samples = []
    for language, prompt, completion in zip(windows.languages, prompts, completions, strict=True):
        index = seen[language] = seen.get(language, -1) + 1
        # The last token of the prompt is <sep>; a response keeps only what is text.
        texts = decode(tokenizer, prompt[:-1]), decode(tokenizer, completion.tokens, special=False)
        samples.append(Sample(language, index, 0, *texts, ended=False, tokens=tuple(completion.tokens)))
    return samples


def choose_weights(names: Sequence[str], world: World) -> tuple[dict[str, float], Table]:
    """Choose each method's weight on validation windows.

    Among the weights of an arm's grid whose masked perplexity is at most `tune_budget` above SFT's, the one with the
    lowest hazard; the cheapest if all cost more. Random features take the weight of SASFT, decoder.
    """
    seed, budget = world.config.tune_seed, world.config.tune_budget
    pairs = [(name, weight) for name in names for weight in ARMS[name].grid]
    jobs = [Job(ARMS[name], weight, seed, (VALIDATION,), sample=False) for name, weight in [(SFT, 0.0), *pairs]]
    reference, *runs = run_jobs(jobs, world, "choosing weights on validation prompts")
    chosen = {name: ARMS[name].weight for name in names}
    costs = [relative_cost(run.metrics, reference.metrics) for run in runs]
    for name in dict.fromkeys(name for name, _ in pairs):
        own = [(cost, run) for cost, run in zip(costs, runs, strict=True) if run.job.method == name]
        within = [run for cost, run in own if cost <= budget]
        best = min(within, key=lambda run: run.metrics.hz) if within else min(own, key=lambda pair: pair[0])[1]
        chosen[name] = best.job.weight
    if "random_features" in chosen and "sasft_decoder" in chosen:
        chosen["random_features"] = chosen["sasft_decoder"]
    rows: list[list[Cell]] = [
        [
            ARMS[run.job.method].title,
            run.job.weight,
            100 * (run.metrics.hz / reference.metrics.hz - 1),
            100 * cost,
            run.job.weight == chosen[run.job.method],
        ]
        for cost, run in zip(costs, runs, strict=True)
    ]
    columns = ["method", "weight", "hazard, %", "masked perplexity, %", "chosen"]
    caption = f"Change against SFT, seed {seed}; budget {100 * budget:g} % of masked perplexity."
    return chosen, Table("Weights on validation prompts", columns, rows, caption)


def relative_cost(metrics: Metrics, reference: Metrics) -> float:
    """Return the rise of masked perplexity as a share."""
    return metrics.masked_ppl / reference.masked_ppl - 1


def _place(job: Job, world: World) -> Artefact:
    settings = {"job": job.to_dict(), **world.config.subset(_SETTINGS)}
    return world.cache.place("switching-run", RUN_VERSION, settings, [world.language_model.key, world.feature_sets.key])


def _run_in_cache(
    config: SwitchingConfig, cache: Cache, model: Artefact, features: Artefact, task: tuple[Artefact, Job]
) -> None:
    place, job = task

    def build(folder: Path) -> None:
        content = execute(job, config, load_switching_model(model, config), FeatureSets(*features))
        (folder / "run.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    cache.fill(place, build)


def _load(job: Job, folder: Path) -> Run:
    content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    content["measured"] = {split: Metrics(**values) for split, values in content["measured"].items()}
    content["samples"] = tuple(Sample(**sample) for sample in content["samples"])
    return Run(job, **{**content, "history": tuple(content["history"])}, folder=folder)


def _gather(name: str, title: str, runs: Sequence[Run], config: SwitchingConfig) -> MethodResult:
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
