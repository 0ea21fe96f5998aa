"""The processes on which the work of both tasks runs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

from qscope_posttrain.report.progress import progress

MAX_WORKERS = 8
"""More processes would each hold a copy of torch in memory for little gain."""

Task = TypeVar("Task")


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
