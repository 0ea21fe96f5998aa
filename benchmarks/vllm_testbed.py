"""DAPO of the arithmetic testbed through vLLM next to the same runs through transformers: curves and end results.

    python -m benchmarks.vllm_testbed [--seeds 0 1 2] [--updates 30] [--workers 2] [--output FILE]

The runs are those of `qscope demo`'s repetition task in its small size (its `heads` are two of width 32 instead of four
of 16, which vLLM's attention for CPUs lacks): plain DAPO, seeded and steered negatives, each with both engines and with
every seed, from one start model and on the same prompts. A seed draws other samples in each engine, so the curves can
agree only within what seeds do. Every run of vLLM is a process of its own, colocated, in float32 and without a
compiler. Trained models are cached; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.interleaved import write_report
from benchmarks.testbed.command import QUICK_REPETITION
from benchmarks.testbed.processes import one_thread
from benchmarks.testbed.repetition.config import ARMS, Arm, RepetitionConfig
from benchmarks.testbed.repetition.experiment import Job, Run, World, make_world, run_jobs, steerable
from qscope_posttrain.report.tables import Table

METHODS = ("plain", "seeded", "default")
ENGINES = ("transformers", "vllm")
CURVES = {"reward": "ordinary/reward", "loops": "ordinary/repeat_ratio", "length": "ordinary/length"}
"""Curve -> metric of the ordinary rows of an update"""
LAST = 10
"""Updates at the end that the table averages over"""
DEFAULT_RESULTS = Path(__file__).parent / "results" / "vllm_testbed.json"


def settings_of(options: argparse.Namespace) -> RepetitionConfig:
    given = {"heads": 2, "seeds": options.seeds, "updates": options.updates, "sampled_problems": options.sampled}
    return RepetitionConfig(**{**QUICK_REPETITION, **given, "arms": list(METHODS), "workers": options.workers})


def arm_of(method: str, engine: str) -> Arm:
    """The testbed's arm, with an engine of its own name where that is vLLM."""
    arm = ARMS[method]
    if engine == "transformers":
        return arm
    return dataclasses.replace(arm, name=f"{method}_vllm", overrides={**arm.overrides, "use_vllm": True})


@contextmanager
def float32_engines() -> Iterator[None]:
    """TRL has no option for the dtype of its engine, nor for one without a compiler."""
    from trl.generation import vllm_generation

    whole = vllm_generation.LLM
    vllm_generation.LLM = functools.partial(whole, dtype="float32", enforce_eager=True)
    try:
        yield
    finally:
        vllm_generation.LLM = whole


def run_one(options: argparse.Namespace) -> None:
    """Make one run of vLLM in this process, for the cache."""
    method, seed = options.only
    with one_thread(), float32_engines():
        world = make_world(settings_of(options), ("window",))
        run_jobs([Job(arm_of(method, "vllm"), int(seed))], world)


def run_all(options: argparse.Namespace) -> tuple[World, list[tuple[str, str, Run]]]:
    """(world, (method, engine, run) of all)."""
    config = settings_of(options)
    with one_thread():
        world = make_world(config, ("window",))
        methods = [arm.name for arm in steerable([ARMS[name] for name in METHODS], world.features)]
        keys = [(method, engine, seed) for engine in ENGINES for method in methods for seed in config.seeds]
        jobs = [Job(arm_of(method, engine), seed) for method, engine, seed in keys]
        run_jobs([job for job, key in zip(jobs, keys, strict=True) if key[1] == "transformers"], world)
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
        words = [sys.executable, "-m", "benchmarks.vllm_testbed", *sys.argv[1:], "--workers", "1", "--only"]
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

        def process(key: tuple[str, str, int]) -> None:
            with socket.socket() as place:  # each engine has a process group of its own
                place.bind(("127.0.0.1", 0))
                port = str(place.getsockname()[1])
            subprocess.run([*words, key[0], str(key[2])], env={**environment, "MASTER_PORT": port}, check=True)

        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(process, [key for key in keys if key[1] == "vllm"]))
        runs = run_jobs(jobs, world)
    return world, [(method, engine, run) for (method, engine, _), run in zip(keys, runs, strict=True)]


def row_of(method: str, engine: str, run: Run) -> dict[str, Any]:
    """Curves and end of a run, JSON-ready."""
    curves = {name: [entry.get(metric) for entry in run.history] for name, metric in CURVES.items()}
    quality = {"loops, %": run.quality.loops, "right, %": run.quality.right}
    end = {name: 100 * count / run.quality.samples for name, count in quality.items()}
    return {"method": method, "engine": engine, "seed": run.job.seed, "curves": curves, **end, "seconds": run.seconds}


def table_of(rows: list[dict[str, Any]]) -> Table:
    """One line per method and quantity, with both engines and what the seeds of each differ by."""
    last = f"in training, last {LAST} updates"
    quantities = {
        f"reward {last}": lambda row: statistics.fmean(row["curves"]["reward"][-LAST:]),
        f"loops {last}, %": lambda row: 100 * statistics.fmean(row["curves"]["loops"][-LAST:]),
        "loops afterwards, %": lambda row: row["loops, %"],
        "right afterwards, %": lambda row: row["right, %"],
    }
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for name, value in quantities.items():
            found = {
                engine: [value(row) for row in rows if (row["method"], row["engine"]) == (method, engine)]
                for engine in ENGINES
            }
            pairs = zip(found["vllm"], found["transformers"], strict=True)
            cells = [_spread(found[engine]) for engine in ENGINES] + [_spread([a - b for a, b in pairs])]
            lines.append([ARMS[method].title, name, *cells])
    seeds = len({row["seed"] for row in rows})
    return Table(
        "DAPO of the arithmetic testbed through both engines",
        ["method", "quantity", *ENGINES, "vllm - transformers, by seed"],
        lines,
        f"Means over {seeds} seeds (lowest .. highest). The same seed gives the same prompts and other samples.",
    )


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3g} ({min(values):.3g} .. {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--sampled", type=int, default=2000, help="held-out problems that each trained model is given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=DEFAULT_RESULTS)
    parser.add_argument("--only", nargs=2, metavar=("METHOD", "SEED"), help="make one run of vLLM, for the cache")
    options = parser.parse_args()
    if options.only:
        run_one(options)
        return
    world, runs = run_all(options)
    rows = [row_of(*entry) for entry in runs]
    table = table_of(rows)
    table.print()
    held = {name: getattr(world.config, name) for name in ("heads", "start", "answer_tokens")}
    del options.only
    write_report(options, "vllm_testbed", world=held, runs=rows, table=table.to_dict())


if __name__ == "__main__":
    main()
