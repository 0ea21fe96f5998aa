"""The processes on which the work of both tasks runs. Torch is imported only when needed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

MAX_WORKERS = 8
"""More processes would each hold a copy of torch in memory for little gain."""

Task = TypeVar("Task")
Result = TypeVar("Result")


def worker_count(wanted: int | None, tasks: int = MAX_WORKERS) -> int:
    """Return `wanted` processes, or one per usable core; never more than there are tasks, at least one."""
    # In a container a process may use fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(wanted or min(cores, MAX_WORKERS), tasks))


def run_in_parallel(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None) -> Iterator[Result]:
    """Call `work` on every task and yield the results as they come, in up to `workers` processes of one thread each.

    With one process it is this one. Otherwise `work`, the tasks and the results travel, so they must be picklable.
    """
    processes = worker_count(workers, len(tasks))
    if processes == 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for process in multiprocessing.active_children():
                # What runs may take minutes more; as on Ctrl-C, it ends at once, and its own processes with it. The
                # pool waits for them when it is left.
                if process.pid is not None:
                    os.kill(process.pid, signal.SIGINT)
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: more are slower on matrices of this size, and processes run in parallel."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _begin() -> None:
    import torch

    torch.set_num_threads(1)
    # Behind `nohup ... &` SIGINT is ignored, here too, and would end nothing.
    signal.signal(signal.SIGINT, signal.default_int_handler)
