"""The experiment: model, own loops, SAEs, features, then every arm and seed from the same start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qscope_posttrain.intervals import Interval, wilson
from qscope_posttrain.testbed.arithmetic.arms import ARMS
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.dictionaries import RepetitionFeatures, make_features
from qscope_posttrain.testbed.arithmetic.language_model import ArithmeticModel, make_language_model
from qscope_posttrain.testbed.arithmetic.loops import OwnLoops, make_loops
from qscope_posttrain.testbed.arithmetic.runs import START, Job, Run, World, run_jobs
from qscope_posttrain.testbed.arithmetic.sae import ArithmeticSAEs, make_saes
from qscope_posttrain.testbed.cache import Cache, open_cache

PLAIN = "plain"
"""The arm with which all others are compared."""


@dataclass(frozen=True)
class ArmResult:
    """One arm over all seeds."""

    name: str
    title: str
    runs: tuple[Run, ...]
    """One a seed."""

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
class Start:
    """A start model and what all training from it reads."""

    language_model: ArithmeticModel
    loops: OwnLoops
    saes: ArithmeticSAEs
    features: RepetitionFeatures


@dataclass(frozen=True)
class ArithmeticExperiment:
    """Everything that a report needs."""

    config: ArithmeticConfig
    language_model: ArithmeticModel
    loops: OwnLoops
    saes: ArithmeticSAEs
    features: RepetitionFeatures
    start: ArmResult
    """The start model, sampled once a seed."""
    arms: tuple[ArmResult, ...]
    """In the order of `ARMS`; the first is plain DAPO."""

    def arm(self, name: str) -> ArmResult:
        """One arm by name."""
        return next(result for result in self.arms if result.name == name)


def run_arithmetic(config: ArithmeticConfig) -> ArithmeticExperiment:
    """Run the chain; what is in the cache is not made again."""
    cache = open_cache(config)
    with one_thread():
        return run_arms(config, cache, make_start(config, cache))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: more are slower on matrices of this size, and processes run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_start(config: ArithmeticConfig, cache: Cache) -> Start:
    """The start model of `config` and what is found in it, from the cache or made."""
    language_model = make_language_model(config, cache)
    loops = make_loops(config, cache, language_model)
    saes = make_saes(config, cache, language_model)
    return Start(language_model, loops, saes, make_features(config, cache, language_model, saes, loops))


def run_arms(config: ArithmeticConfig, cache: Cache, start: Start) -> ArithmeticExperiment:
    """Every arm of `config`, plain among them, from one start with every seed."""
    names = [name for name in ARMS if name in config.arms or name == PLAIN]
    jobs = [Job(name, seed) for seed in config.seeds for name in (START, *names)]
    world = World.of(start.language_model, start.loops, start.features)
    runs = run_jobs(jobs, config, cache, world, "training with and without negatives")
    return ArithmeticExperiment(
        config=config,
        language_model=start.language_model,
        loops=start.loops,
        saes=start.saes,
        features=start.features,
        start=_gather(START, "before DAPO", runs),
        arms=tuple(_gather(name, ARMS[name].title, runs) for name in names),
    )


def _gather(name: str, title: str, runs: Sequence[Run]) -> ArmResult:
    return ArmResult(name, title, tuple(run for run in runs if run.job.arm == name))
