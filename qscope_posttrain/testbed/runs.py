"""One run: fine-tune with one method and one seed, measure, sample; many of them side by side, each cached."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qscope_posttrain.models.generation import Sample
from qscope_posttrain.report.progress import progress
from qscope_posttrain.testbed.arms import ARMS, Arm
from qscope_posttrain.testbed.cache import Cache
from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.cores import worker_count
from qscope_posttrain.testbed.dictionaries import RANDOM_DRAWS, FeatureSets
from qscope_posttrain.testbed.finetune import fine_tune
from qscope_posttrain.testbed.language_model import LanguageModel, load_language_model
from qscope_posttrain.testbed.metrics import Metrics, teacher_forced_metrics
from qscope_posttrain.testbed.sampling import sample_responses
from qscope_posttrain.testbed.tokenizer import decode

BASE = "base"
"""Name of the run without fine-tuning."""

_SOURCES = ("testbed/runs.py",)
_SETTINGS = (
    "sft_windows", "sft_batch_size", "sft_learning_rate", "sft_switch", "prior_windows", "penalised",
    "evaluation_windows", "sampled_prompts", "sampled_tokens", "temperature", "window", "prompt",
)  # fmt: skip
_EVALUATION_SEED = 31
_SAMPLING_SEED = 1000
_PRIOR_SEED = 50_000
VALIDATION, TEST = "val", "test"


@dataclass(frozen=True)
class Job:
    """What to run."""

    arm: Arm | None
    """The method; None for the model before fine-tuning."""
    weight: float
    seed: int
    splits: tuple[str, ...]
    """On which windows to measure: "val", "test" or both."""
    sample: bool = True
    """Whether to sample responses to prompts of the last split; without them a run takes two thirds of the time."""

    @property
    def method(self) -> str:
        """Name of the arm, or `base`."""
        return BASE if self.arm is None else self.arm.name

    def to_dict(self) -> dict[str, Any]:
        """What decides how a run comes out, as JSON values."""
        arm = {} if self.arm is None else self.arm.to_dict()
        return {"arm": arm, "weight": self.weight, "seed": self.seed, "splits": self.splits, "sample": self.sample}


@dataclass(frozen=True)
class Run:
    """What came out of a job."""

    job: Job
    measured: Mapping[str, Metrics]
    """By split."""
    samples: tuple[Sample, ...]
    """One response to every prompt; `sample_index` is 0."""
    history: tuple[Mapping[str, float], ...]
    """The trainer's log, one entry a step."""
    seconds: float
    """Wall time of training."""
    step_seconds: float
    """Median wall time of a training step."""
    folder: Path
    """Where it lies in the cache."""

    @property
    def metrics(self) -> Metrics:
        """On the last split of the job."""
        return self.measured[self.job.splits[-1]]


def run_jobs(
    jobs: Sequence[Job],
    config: TestbedConfig,
    cache: Cache,
    language_model: LanguageModel,
    feature_sets: FeatureSets,
    description: str,
) -> list[Run]:
    """Run jobs that are not in the cache, in `config.workers` processes of one thread each; results in their order.

    The result of a job does not depend on the number of processes. With one, jobs run in this process.
    """
    keys = [_key(job, config, cache, language_model, feature_sets) for job in jobs]
    folders: dict[str, Path] = {}
    missing: list[tuple[str, Job]] = []
    for key, job in dict(zip(keys, jobs, strict=True)).items():
        place = cache.root / f"run-{key}"
        if cache.enabled and place.is_dir():
            folders[key] = place
        else:
            missing.append((key, job))
    places = (language_model.folder, language_model.key, feature_sets.folder, feature_sets.key)
    workers = worker_count(config.workers, len(missing))
    if workers == 1:
        for key, job in progress(missing, description=description):
            folders[key] = _run_in_cache(key, job, config, cache, places)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool:
            futures = {pool.submit(_run_in_cache, key, job, config, cache, places): key for key, job in missing}
            try:
                for future in progress(as_completed(futures), total=len(futures), description=description):
                    folders[futures[future]] = future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [_load(job, folders[key]) for key, job in zip(keys, jobs, strict=True)]


def execute(
    job: Job, config: TestbedConfig, language_model: LanguageModel, feature_sets: FeatureSets
) -> dict[str, Any]:
    """Run one job in this process, without the cache: the fields of `Run`, JSON-ready, but for job and folder."""
    model = language_model.model
    history: tuple[Mapping[str, float], ...] = ()
    seconds = step_seconds = 0.0
    if job.arm is not None:
        arm, start = job.arm, None
        if config.prior_windows:
            start = fine_tune(
                language_model, ARMS["sft"], 0.0, None, config, _PRIOR_SEED + job.seed, windows=config.prior_windows
            ).model
        features = feature_sets.load(_rows_of(arm, job.seed)) if arm.uses_features else None
        tuned = fine_tune(language_model, arm, job.weight, features, config, job.seed, start=start)
        model, history, seconds, step_seconds = tuned.model, tuned.history, tuned.seconds, tuned.step_seconds
    measured = {split: asdict(_measure(split, config, language_model, model)) for split in job.splits}
    samples = _sample(job, config, language_model, model) if job.sample else ()
    return {
        "measured": measured,
        "samples": [asdict(sample) for sample in samples],
        "history": history,
        "seconds": seconds,
        "step_seconds": step_seconds,
    }


def _measure(split: str, config: TestbedConfig, language_model: LanguageModel, model: PreTrainedModel) -> Metrics:
    """On the same windows for all methods and seeds."""
    maker, count = language_model.maker, config.evaluation_windows
    windows = maker.dialogue(split, count, _EVALUATION_SEED)
    switching = maker.dialogue(split, max(1, count // 2), _EVALUATION_SEED + 2, 1.0, language_model.sources)
    return teacher_forced_metrics(model, windows, switching, config.target, language_model.target_tokens)


def _sample(job: Job, config: TestbedConfig, language_model: LanguageModel, model: Any) -> tuple[Sample, ...]:
    """One response to each prompt; prompts are the same for all methods and seeds."""
    maker, tokenizer = language_model.maker, language_model.tokenizer
    windows = maker.dialogue(
        job.splits[-1], config.sampled_prompts, _EVALUATION_SEED + 1, languages=language_model.sources
    )
    responses = sample_responses(
        model, windows.prompts, config.sampled_tokens, config.temperature, _SAMPLING_SEED + job.seed
    )
    seen: dict[str, int] = {}
    samples = []
    for language, prompt, response in zip(windows.languages, windows.prompts, responses, strict=True):
        index = seen[language] = seen.get(language, -1) + 1
        # The last token of the prompt is <sep>; a response keeps only what is text.
        texts = decode(tokenizer, prompt[:-1]), decode(tokenizer, response, special=False)
        samples.append(Sample(language, index, 0, *texts, ended=False, tokens=tuple(response.tolist())))
    return tuple(samples)


def _rows_of(arm: Arm, seed: int) -> str:
    """Name of the arm's feature set."""
    return f"random-{seed % RANDOM_DRAWS}" if arm.rows == "random" else arm.rows


def _key(
    job: Job, config: TestbedConfig, cache: Cache, language_model: LanguageModel, feature_sets: FeatureSets
) -> str:
    settings = {"job": job.to_dict(), **config.subset(*_SETTINGS)}
    return cache.key(settings, _SOURCES, [language_model.key, feature_sets.key])


def _prepare_worker() -> None:
    """Several processes share the cores: one thread each."""
    torch.set_num_threads(1)


def _run_in_cache(key: str, job: Job, config: TestbedConfig, cache: Cache, places: tuple[Path, str, Path, str]) -> Path:
    def build(folder: Path) -> None:
        language_model = load_language_model(places[0], places[1], config)
        content = execute(job, config, language_model, FeatureSets(places[2], places[3]))
        (folder / "run.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    return cache.folder("run", key, build)


def _load(job: Job, folder: Path) -> Run:
    content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return Run(
        job=job,
        measured={split: Metrics(**values) for split, values in content["measured"].items()},
        samples=tuple(Sample(**sample) for sample in content["samples"]),
        history=tuple(content["history"]),
        seconds=content["seconds"],
        step_seconds=content["step_seconds"],
        folder=folder,
    )
