"""How many processes to use, and which device."""

from __future__ import annotations

import os

import torch

WORKERS_AT_MOST = 8
"""More would each hold a copy of torch in memory for little gain."""


def available_cores() -> int:
    """Cores that this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_count(wanted: int | None, tasks: int) -> int:
    """`wanted` processes, or one a core; never more than there are tasks, at least one."""
    return max(1, min(wanted or min(available_cores(), WORKERS_AT_MOST), tasks))


def resolve_device(name: str) -> str:
    """A device's name, where "auto" is cuda if there is one, else the CPU."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
