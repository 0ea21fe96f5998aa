"""Two ranks of one gloo group, forked from a process that has imported everything: imports are most of their cost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing as mp
from free_port import free_port


def run_rank(rank: int, port: int, work: Callable[[Path], None], folder: Path) -> None:
    """Do `work` with the environment that torchrun gives a rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(folder)


def run_two_ranks(work: Callable[[Path], None], folder: Path) -> None:
    """Do `work` in both ranks; an error in one ends both and is raised here."""
    mp.start_processes(run_rank, args=(free_port(), work, folder), nprocs=2, start_method="fork")
