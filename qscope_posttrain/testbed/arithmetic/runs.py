"""Many runs side by side: train with one arm and one seed, then sample; trained models and samples cached apart."""

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

from qscope_posttrain.report.progress import progress
from qscope_posttrain.testbed.arithmetic.arms import ARMS
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.dictionaries import RepetitionFeatures
from qscope_posttrain.testbed.arithmetic.language_model import (
    ArithmeticModel,
    load_language_model,
    load_trained_model,
)
from qscope_posttrain.testbed.arithmetic.loops import OwnLoops, load_loops
from qscope_posttrain.testbed.arithmetic.probes import Probes, measure_probes
from qscope_posttrain.testbed.arithmetic.quality import Quality, count, is_loop, is_right_completion
from qscope_posttrain.testbed.arithmetic.sampling import Completion, sample_completions
from qscope_posttrain.testbed.arithmetic.task import Problem, draw_benign_problems, draw_problems
from qscope_posttrain.testbed.arithmetic.tokenizer import decode_words
from qscope_posttrain.testbed.arithmetic.training import train
from qscope_posttrain.testbed.cache import Cache
from qscope_posttrain.testbed.cores import worker_count
from qscope_posttrain.testbed.language_model import save_model

START = "start"
"""Name of the run without training."""

_TRAINING_SOURCES = ("testbed/arithmetic/training.py", "testbed/arithmetic/probes.py")
_TRAINING_SETTINGS = (
    "fewest_operations", "most_operations", "answer_tokens", "updates", "prompts_per_update", "rows_per_prompt",
    "learning_rate", "temperature", "probe_every", "probe_solutions", "model_seed",
)  # fmt: skip
_SAMPLING_SOURCES = ("testbed/arithmetic/runs.py",)
_SAMPLING_SETTINGS = (
    "fewest_operations", "most_operations", "answer_tokens", "temperature", "sampled_problems", "benign_problems",
)  # fmt: skip
_PROBLEM_SEED = 31
_SAMPLING_SEED = 1000
_KEPT_SAMPLES = 200
_SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class Job:
    """What to run."""

    arm: str
    """Name of an arm, or `start`."""
    seed: int


@dataclass(frozen=True)
class Run:
    """What came out of a job."""

    job: Job
    probes: Mapping[int, Probes]
    """By update; 0 is the start, and all there is for `start`."""
    quality: Quality
    """On held-out problems."""
    benign: Quality
    """On problems whose steps are rightly equal."""
    history: tuple[Mapping[str, float], ...]
    """The trainer's log, one entry an update."""
    seconds: float
    """Wall time of training."""
    model_folder: Path
    """The trained model, in the format of transformers."""
    folder: Path
    """Where `samples.jsonl` lies: the first held-out problems with what the model wrote, an object a line with
    `problem` (its number), `prompt`, `completion`, `loop` and `right`."""

    @property
    def last_probes(self) -> Probes:
        """After the last update."""
        return self.probes[max(self.probes)]


@dataclass(frozen=True)
class World:
    """What all runs share, as places from which a worker process can read it."""

    language_model: tuple[Path, str]
    loops: tuple[Path, str]
    features: tuple[Path, str]

    @classmethod
    def of(cls, language_model: ArithmeticModel, loops: OwnLoops, features: RepetitionFeatures) -> World:
        return cls(
            (language_model.folder, language_model.key), (loops.folder, loops.key), (features.folder, features.key)
        )

    @property
    def keys(self) -> list[str]:
        return [self.language_model[1], self.loops[1], self.features[1]]


def run_jobs(
    jobs: Sequence[Job], config: ArithmeticConfig, cache: Cache, world: World, description: str = "training"
) -> list[Run]:
    """Run jobs that are not in the cache, in `config.workers` processes of one thread each; results in their order.

    The result of a job does not depend on the number of processes. With one, jobs run in this process.
    """
    unique = list(dict.fromkeys(jobs))
    missing = [job for job in unique if not (cache.enabled and _run_folder(job, config, cache, world).is_dir())]
    workers = worker_count(config.workers, len(missing))
    if workers == 1:
        for job in progress(missing, description=description):
            _run_in_cache(job, config, cache, world)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool:
            futures = [pool.submit(_run_in_cache, job, config, cache, world) for job in missing]
            try:
                for future in progress(as_completed(futures), total=len(futures), description=description):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [_load(job, config, cache, world) for job in jobs]


def training_key(job: Job, config: ArithmeticConfig, cache: Cache, world: World) -> str:
    """Key of the trained model: of the arm and what it reads, and of nothing else."""
    settings = {"seed": job.seed, "arm": ARMS[job.arm].to_dict(), **config.subset(*_TRAINING_SETTINGS)}
    return cache.key(settings, _TRAINING_SOURCES, world.keys)


def _run_key(job: Job, config: ArithmeticConfig, cache: Cache, world: World) -> str:
    trained = "start" if job.arm == START else training_key(job, config, cache, world)
    settings = {"seed": job.seed, **config.subset(*_SAMPLING_SETTINGS)}
    return cache.key(settings, _SAMPLING_SOURCES, [*world.keys, trained])


def _run_folder(job: Job, config: ArithmeticConfig, cache: Cache, world: World) -> Path:
    return cache.root / f"arithmetic-run-{_run_key(job, config, cache, world)}"


def _prepare_worker() -> None:
    """Several processes share the cores: one thread each."""
    torch.set_num_threads(1)


def _run_in_cache(job: Job, config: ArithmeticConfig, cache: Cache, world: World) -> None:
    def build(folder: Path) -> None:
        language_model = load_language_model(*world.language_model, config.torch_device())
        trained = _trained_folder(job, config, cache, world)
        model = language_model.model if trained is None else load_trained_model(trained, config.torch_device())
        content = _evaluate(model, language_model, config, job.seed, folder)
        if trained is None:
            probes = load_loops(*world.loops).probe_set(language_model, config)
            content["probes"] = {0: asdict(measure_probes(model, probes))}
        (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")

    cache.folder("arithmetic-run", _run_key(job, config, cache, world), build)


def _trained_folder(job: Job, config: ArithmeticConfig, cache: Cache, world: World) -> Path | None:
    """Where the trained model lies, after training it if need be; None for the start model."""
    if job.arm == START:
        return None
    key = training_key(job, config, cache, world)
    return cache.folder("arithmetic-training", key, lambda folder: _train(job, config, world, folder))


def _train(job: Job, config: ArithmeticConfig, world: World, folder: Path) -> None:
    language_model = load_language_model(*world.language_model, config.torch_device())
    probes = load_loops(*world.loops).probe_set(language_model, config)
    arm = ARMS[job.arm]
    features = RepetitionFeatures(*world.features).load(arm.steering)
    trained = train(language_model, arm, job.seed, config, probes, features)
    save_model(trained.model, language_model.tokenizer, folder)
    content = {
        "probes": {step: asdict(found) for step, found in trained.probes.items()},
        "history": trained.history,
        "seconds": trained.seconds,
    }
    (folder / "training.json").write_text(json.dumps(content), encoding="utf-8")


def _evaluate(
    model: PreTrainedModel, language_model: ArithmeticModel, config: ArithmeticConfig, seed: int, folder: Path
) -> dict[str, Any]:
    """Sample with fixed problems; what differs between runs of one model is the sampling only."""
    ordinary = draw_problems(config.sampled_problems, config.operations, _PROBLEM_SEED, held_out=True)
    benign = draw_benign_problems(config.benign_problems, config.operations, _PROBLEM_SEED)
    content: dict[str, Any] = {}
    for name, problems in (("quality", ordinary), ("benign", benign)):
        completions = sample_completions(
            model,
            language_model.prompts(problems),
            config.answer_tokens,
            temperature=config.temperature,
            seed=_SAMPLING_SEED + seed,
        )
        content[name] = asdict(count(language_model, problems, completions))
        if problems is ordinary:
            _write_samples(folder / _SAMPLES_FILE, language_model, problems, completions)
    return content


def _write_samples(
    path: Path, language_model: ArithmeticModel, problems: Sequence[Problem], completions: Sequence[Completion]
) -> None:
    lines = []
    for index, (problem, completion) in enumerate(zip(problems, completions, strict=True)):
        if index == _KEPT_SAMPLES:
            break
        sample = {
            "problem": index,
            "prompt": " ".join(problem.prompt.split()[1:-1]),  # without the marks around it
            "completion": " ".join(decode_words(language_model.tokenizer, completion.tokens)),
            "loop": is_loop(completion),
            "right": is_right_completion(language_model, problem, completion),
        }
        lines.append(json.dumps(sample) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _load(job: Job, config: ArithmeticConfig, cache: Cache, world: World) -> Run:
    folder = _run_folder(job, config, cache, world)
    sampled = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if job.arm == START:
        trained: dict[str, Any] = {"probes": sampled["probes"], "history": [], "seconds": 0.0}
        model_folder = world.language_model[0]
    else:
        model_folder = cache.root / f"arithmetic-training-{training_key(job, config, cache, world)}"
        trained = json.loads((model_folder / "training.json").read_text(encoding="utf-8"))
    return Run(
        job=job,
        probes={int(step): Probes(**values) for step, values in trained["probes"].items()},
        quality=Quality(**sampled["quality"]),
        benign=Quality(**sampled["benign"]),
        history=tuple(trained["history"]),
        seconds=trained["seconds"],
        model_folder=model_folder,
        folder=folder,
    )
