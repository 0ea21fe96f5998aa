"""Settings that both tasks share, and the processes on which their work runs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import torch

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import progress

MAX_WORKERS = 8
"""More processes would each hold a copy of torch in memory for little gain."""

Task = TypeVar("Task")


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with a help text; a list is copied for each instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TaskSettings:
    """Fields that the settings of both tasks share."""

    device: str = option("cpu", "Where models are trained and run: cpu, cuda, or auto.")
    workers: int | None = option(None, "Processes that run methods in parallel, one thread each; one per core.")
    cache: str | None = option(None, "Folder of cached artefacts; ~/.cache/qscope_posttrain/testbed by default.")
    no_cache: bool = option(False, "Ignore the cache and make everything again.")

    def torch_device(self) -> str:
        """Resolve `device`: "auto" is cuda if there is one, else the CPU."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def subset(self, names: Sequence[str]) -> dict[str, Any]:
        """Return some settings as JSON values, for the key of an artefact."""
        values = asdict(self)
        return {name: values[name] for name in names}

    def _check(
        self, task: str, known_arms: Mapping[str, Any], shares: Sequence[str], above_zero: Sequence[str]
    ) -> None:
        """Check numbers, arms, seeds and what is declared here; whole numbers are counts, except seeds and zeros."""
        values = asdict(self)
        counts = [f.name for f in fields(self) if type(f.default) is int and f.default and "seed" not in f.name]
        for names, fits, expected in (
            (counts, lambda value: value >= 1, "must be at least 1"),
            (shares, lambda value: 0.0 <= value < 1.0, "is a share in [0, 1)"),
            (above_zero, lambda value: value > 0, "must be above 0"),
        ):
            for name in names:
                if not fits(values[name]):
                    raise UserValueError(f"{task} setting {name} {expected}, got {values[name]}")
        unknown = sorted(set(values["arms"]) - set(known_arms))
        if unknown:
            raise UserValueError(f"unknown methods {unknown}; the {task} task has {', '.join(known_arms)}")
        seeds = values["seeds"]
        if len(set(seeds)) != len(seeds) or not seeds:
            raise UserValueError(f"seeds must be different numbers, at least one; got {seeds}")
        if self.workers is not None and self.workers < 1:
            raise UserValueError(f"workers must be at least 1, got {self.workers}")
        if self.device not in ("cpu", "cuda", "auto"):
            raise UserValueError(f"{task} setting device is cpu, cuda or auto, got {self.device!r}")
        if values["pretraining_batch_size"] % 2:
            raise UserValueError(f"pretraining_batch_size must be even, got {values['pretraining_batch_size']}")


def worker_count(wanted: int | None, tasks: int) -> int:
    """Return `wanted` processes, or one per usable core; never more than there are tasks, at least one."""
    # In a container a process may use fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(wanted or min(cores, MAX_WORKERS), tasks))


def run_in_parallel(
    work: Callable[[Task], object], tasks: Sequence[Task], workers: int | None, description: str
) -> None:
    """Call `work` on every task, in up to `workers` processes of one thread each; with one, in this process.

    `work` and the tasks are sent to other processes, so they must be picklable.
    """
    processes = worker_count(workers, len(tasks))
    if processes == 1:
        for task in progress(tasks, description=description):
            work(task)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in progress(as_completed(futures), total=len(futures), description=description):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: more are slower on matrices of this size, and processes run in parallel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
