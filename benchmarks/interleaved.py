"""What benchmarks of several ways to do one thing share: rounds in turn, ratios with their spread, peak memory.

In every round each way runs once, in an order that rotates from round to round, so that drifts of the machine meet all
of them. Processor time is given beside wall time: on a busy machine only the first can be trusted.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{name: {"wall": seconds per round, "processor": ...}}; a first round, not counted, warms up."""
    names = list(ways)
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "processor": []} for name in names}
    for turn in range(-1, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            wall, processor = time.perf_counter(), time.process_time()
            ways[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name]["wall"].append(time.perf_counter() - wall)
                seconds[name]["processor"].append(time.process_time() - processor)
    return seconds


def ratios(seconds: Mapping[str, Mapping[str, list[float]]], reference: str, clock: str) -> dict[str, dict[str, float]]:
    """{name: median seconds, and the rounds' ratios of its time to the reference's: median, lowest, highest}."""
    found = {}
    for name, clocks in seconds.items():
        per_round = [a / b for a, b in zip(clocks[clock], seconds[reference][clock], strict=True)]
        found[name] = {
            "median_s": statistics.median(clocks[clock]),
            "ratio": statistics.median(per_round),
            "lowest": min(per_round),
            "highest": max(per_round),
        }
    return found


def extra_memory_mib(build: Callable[[Any, str], Callable[[], object]], settings: Any, name: str) -> float:
    """Resident memory that one call of `build(settings, name)()` adds at its peak, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_extra, (build, settings, name))


def _extra(build: Callable[[Any, str], Callable[[], object]], settings: Any, name: str) -> float:
    torch.set_num_threads(1)
    run = build(settings, name)
    started = _resident_kib()
    # The high-water mark of making the inputs would hide what the call takes.
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return (_highest_kib() - started) / 1024


def _resident_kib() -> int:
    return _status("VmRSS")


def _highest_kib() -> int:
    return max(_status("VmHWM"), 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
