"""The experiment: model, own loops, SAEs, features, then every arm and seed from the same start."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from benchmarks.testbed.cache import Artefact, Cache, open_cache, run_missing
from benchmarks.testbed.models import Dictionaries, LanguageModel, load_language_model, load_model, save_model
from benchmarks.testbed.processes import one_thread
from benchmarks.testbed.repetition.config import ARMS, PLAIN, Arm, RepetitionConfig
from benchmarks.testbed.repetition.features import WAYS, WINDOW, RepetitionFeatures, make_features, make_saes
from benchmarks.testbed.repetition.language_model import (
    OwnLoops,
    load_loops,
    make_language_model,
    make_loops,
    prompt_ids,
)
from benchmarks.testbed.repetition.task import (
    Problem,
    decode_words,
    draw_benign_problems,
    draw_problems,
    is_right,
)
from benchmarks.testbed.repetition.training import Watcher, train
from benchmarks.testbed.sampling import BATCH, SmallModelSampler
from qscope_posttrain.features.steering import SETTINGS_KEY
from qscope_posttrain.intervals import Interval, wilson
from qscope_posttrain.models.generation import Response, SamplingSettings
from qscope_posttrain.report.progress import status
from qscope_posttrain.text.repetition import is_endless_repetition

START = "start"
"""Name of the run without training."""

# Raise these when the same settings would give another trained model (trainer, negatives, rewards) or other samples of
# the same model (sampling, what counts as a loop or a right answer).
TRAINING_VERSION = "1"
RUN_VERSION = "1"
_TRAINING = (
    "fewest_operations", "most_operations", "answer_tokens", "updates", "prompts_per_update", "rows_per_prompt",
    "learning_rate", "temperature", "model_seed",
)  # fmt: skip
_SAMPLING = (
    "fewest_operations", "most_operations", "answer_tokens", "temperature", "sampled_problems", "benign_problems",
)  # fmt: skip
_PROBLEM_SEED, _SAMPLING_SEED = 31, 1000
_KEPT_SAMPLES = 200
_SAMPLES_FILE = "samples.jsonl"


class Watch(Protocol):
    """Something that measures models on their way; sent to other processes, so it must be picklable."""

    @property
    def every(self) -> int:
        """Updates between two measurements."""

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the measurements, as JSON values."""

    def prepare(
        self, language_model: LanguageModel, loops: OwnLoops, config: RepetitionConfig
    ) -> Callable[[PreTrainedModel], dict[str, float]]:
        """Return the measurement of a model that was trained from `language_model`."""


@dataclass(frozen=True)
class Job:
    """One run: an arm and a seed, or (`arm` None) the start model, sampled."""

    arm: Arm | None
    seed: int

    @property
    def method(self) -> str:
        """Name of the arm, or `start`."""
        return START if self.arm is None else self.arm.name


@dataclass(frozen=True)
class Quality:
    """Counts over samples, one per problem."""

    samples: int
    loops: int
    """Samples that repeat without end: cut at the length limit with at least four copies of a period."""
    unended: int
    """Samples cut at the length limit, loops among them."""
    right: int
    """Samples with the right answer."""


@dataclass(frozen=True)
class Run:
    """The result of a job."""

    job: Job
    watched: Mapping[int, Mapping[str, float]]
    """Measurements of a `Watch`, by update; 0 is the start, and all there is for `start`."""
    quality: Quality
    """On held-out problems."""
    benign: Quality
    """On problems whose steps are rightly equal."""
    history: tuple[Mapping[str, float], ...]
    """The trainer's log, one entry per update."""
    seconds: float
    """Wall time of training."""
    folder: Path
    """Where `samples.jsonl` lies: the first held-out problems with what the model wrote, one JSON object per line with
    `problem` (its number), `prompt`, `completion`, `loop` and `right`."""


@dataclass(frozen=True)
class ArmResult:
    """One arm over all seeds."""

    name: str
    title: str
    runs: tuple[Run, ...]
    """One per seed."""

    @property
    def loop_rate(self) -> Interval:
        """Sampled loops of all seeds together, with the Wilson interval of independent samples.

        Samples of one trained model are not independent: read it with the rates per seed.
        """
        return wilson(sum(run.quality.loops for run in self.runs), sum(run.quality.samples for run in self.runs))

    @property
    def accuracy(self) -> Interval:
        """Right answers of all seeds together, see `loop_rate`."""
        return wilson(sum(run.quality.right for run in self.runs), sum(run.quality.samples for run in self.runs))


@dataclass(frozen=True)
class World:
    """A start model and everything that training from it reads."""

    config: RepetitionConfig
    cache: Cache
    language_model: LanguageModel
    loops: OwnLoops
    saes: Dictionaries
    features: RepetitionFeatures


@dataclass(frozen=True)
class Experiment:
    """Everything that a report needs."""

    world: World
    start: ArmResult
    """The start model, sampled once per seed."""
    arms: tuple[ArmResult, ...]
    """In the order that was asked for; the first is plain DAPO."""

    @property
    def config(self) -> RepetitionConfig:
        return self.world.config

    def arm(self, name: str) -> ArmResult:
        """Return one arm by name."""
        return next(result for result in self.arms if result.name == name)


def run_experiment(config: RepetitionConfig) -> Experiment:
    """Run the whole chain with the arms of `config`, plain among them; what is in the cache is not made again."""
    arms = [arm for name, arm in ARMS.items() if name in config.arms or name == PLAIN]
    used = {WINDOW, *(arm.steering for arm in arms)}
    with one_thread():
        world = make_world(config, [way for way in WAYS if way in used])
        return run_arms(world, steerable(arms, world.features))


def steerable(arms: Sequence[Arm], features: RepetitionFeatures) -> list[Arm]:
    """Leave out, with a warning, arms that steer where no feature makes the model loop."""
    left_out = [arm for arm in arms if arm.steers and SETTINGS_KEY not in features.load(arm.steering).settings]
    if left_out:
        titles = ", ".join(arm.title for arm in left_out)
        status(f"warning: steering along features never made the model loop; left out: {titles}", enabled=True)
    return [arm for arm in arms if arm not in left_out]


def make_world(config: RepetitionConfig, ways: Sequence[str] = WAYS) -> World:
    """Make the start model of `config` and find features for some ways to steer, or take them from the cache."""
    cache = open_cache(config)
    language_model = make_language_model(config, cache)
    loops = make_loops(config, cache, language_model)
    saes = make_saes(config, cache, language_model)
    features = make_features(config, cache, language_model, saes, loops, ways)
    return World(config, cache, language_model, loops, saes, features)


def run_arms(world: World, arms: Sequence[Arm], watch: Watch | None = None) -> Experiment:
    """Run every arm with every seed from one start."""
    jobs = [Job(arm, seed) for seed in world.config.seeds for arm in (None, *arms)]
    runs = run_jobs(jobs, world, watch, "training with and without negatives")

    def gather(name: str, title: str) -> ArmResult:
        return ArmResult(name, title, tuple(run for run in runs if run.job.method == name))

    return Experiment(world, gather(START, "before DAPO"), tuple(gather(arm.name, arm.title) for arm in arms))


def run_jobs(jobs: Sequence[Job], world: World, watch: Watch | None = None, description: str = "training") -> list[Run]:
    """Run the jobs that are not in the cache, in `config.workers` processes; return the results in their order.

    Trained models and their samples are cached apart. The result of a job does not depend on the number of processes.
    """
    places = [_places(job, world, watch) for job in jobs]
    inputs = [Artefact(part.folder, part.key) for part in (world.language_model, world.loops, world.features)]
    work = functools.partial(_run_in_cache, world.config, world.cache, inputs, watch)
    tasks = {place: (job, trained) for job, (trained, place) in zip(jobs, places, strict=True)}
    run_missing(world.cache, tasks, work, world.config.workers, description)
    return [_load(job, *found) for job, found in zip(jobs, places, strict=True)]


def _places(job: Job, world: World, watch: Watch | None) -> tuple[Artefact, Artefact]:
    """Return the places of the trained model and of its samples."""
    config, cache = world.config, world.cache
    keys = [world.language_model.key, world.loops.key, world.features.key]
    trained = Artefact(world.language_model.folder, START)
    if job.arm is not None:
        settings = {"seed": job.seed, "arm": job.arm.to_dict(), **config.subset(_TRAINING)}
        settings["watch"] = None if watch is None else watch.to_dict()
        trained = cache.place("repetition-training", TRAINING_VERSION, settings, keys)
    settings = {"seed": job.seed, **config.subset(_SAMPLING)}
    if job.arm is None:
        settings["watch"] = None if watch is None else watch.to_dict()
    return trained, cache.place("repetition-run", RUN_VERSION, settings, [*keys, trained.key])


def _run_in_cache(
    config: RepetitionConfig,
    cache: Cache,
    inputs: Sequence[Artefact],
    watch: Watch | None,
    task: tuple[Artefact, tuple[Job, Artefact]],
) -> None:
    place, (job, trained) = task
    model_place, loops_place, features_place = inputs

    def build(folder: Path) -> None:
        language_model = load_language_model(*model_place, config.torch_device())
        watcher = None
        if watch is not None:
            watcher = Watcher(watch.prepare(language_model, load_loops(*loops_place), config), watch.every)
        if job.arm is None:
            model = language_model.model
        else:
            features = RepetitionFeatures(*features_place)
            cache.fill(trained, functools.partial(_train, job, job.arm, config, language_model, features, watcher))
            model = load_model(trained.folder, config.torch_device())
        content = _evaluate(model, language_model, config, job.seed, folder)
        if job.arm is None and watcher is not None:
            watcher.look(0, model)
            content["watched"] = watcher.found
        (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")

    cache.fill(place, build)


def _train(
    job: Job,
    arm: Arm,
    config: RepetitionConfig,
    language_model: LanguageModel,
    features: RepetitionFeatures,
    watcher: Watcher | None,
    folder: Path,
) -> None:
    trained = train(language_model, arm, job.seed, config, features.load(arm.steering), watcher)
    save_model(trained.model, language_model.tokenizer, folder)
    watched = {} if watcher is None else watcher.found
    content = {"watched": watched, "history": trained.history, "seconds": trained.seconds}
    (folder / "training.json").write_text(json.dumps(content), encoding="utf-8")


def _evaluate(
    model: PreTrainedModel, language_model: LanguageModel, config: RepetitionConfig, seed: int, folder: Path
) -> dict[str, Any]:
    """Sample with fixed problems: runs of one model differ in the sampling only."""
    ordinary = draw_problems(config.sampled_problems, config.operations, _PROBLEM_SEED, held_out=True)
    benign = draw_benign_problems(config.benign_problems, config.operations, _PROBLEM_SEED)
    sampler = SmallModelSampler(model, language_model.tokenizer.eos_token_id)
    settings = SamplingSettings(
        samples_per_prompt=1,
        temperature=config.temperature,
        top_p=1.0,
        max_new_tokens=config.answer_tokens,
        seed=_SAMPLING_SEED + seed,
        batch_size=BATCH,
    )
    content: dict[str, Any] = {}
    for name, problems in (("quality", ordinary), ("benign", benign)):
        completions = sampler.sample(prompt_ids(language_model, problems), settings)
        samples = [_sample(language_model, *pair) for pair in enumerate(zip(problems, completions, strict=True))]
        content[name] = {
            "samples": len(samples),
            "loops": sum(sample["loop"] for sample in samples),
            "unended": sum(not completion.ended for completion in completions),
            "right": sum(sample["right"] for sample in samples),
        }
        if problems is ordinary:
            lines = [json.dumps(sample) + "\n" for sample in samples[:_KEPT_SAMPLES]]
            (folder / _SAMPLES_FILE).write_text("".join(lines), encoding="utf-8")
    return content


def _sample(language_model: LanguageModel, index: int, pair: tuple[Problem, Response]) -> dict[str, Any]:
    problem, completion = pair
    words = decode_words(language_model.tokenizer, completion.tokens)
    return {
        "problem": index,
        "prompt": " ".join(problem.prompt.split()[1:-1]),  # without the marks around it
        "completion": " ".join(words),
        "loop": is_endless_repetition(completion.tokens, ended=completion.ended),
        "right": is_right(problem.answer, words, completion.ended),
    }


def _load(job: Job, trained: Artefact, place: Artefact) -> Run:
    sampled = json.loads((place.folder / "run.json").read_text(encoding="utf-8"))
    training: dict[str, Any] = {"watched": sampled.get("watched", {}), "history": [], "seconds": 0.0}
    if job.arm is not None:
        training = json.loads((trained.folder / "training.json").read_text(encoding="utf-8"))
    return Run(
        job=job,
        watched={int(step): values for step, values in training["watched"].items()},
        quality=Quality(**sampled["quality"]),
        benign=Quality(**sampled["benign"]),
        history=tuple(training["history"]),
        seconds=training["seconds"],
        folder=place.folder,
    )
