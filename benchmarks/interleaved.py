"""Parts that benchmarks share: interleaved rounds, ratios with their spread, peak memory, a random model, results.

In every round each way runs once, in an order that rotates from round to round, so that drifts of the machine meet all
of them. Processor time is given beside wall time: on a busy machine only the first can be trusted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qscope_posttrain.provenance import machine, package_versions

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


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


def random_qwen3(settings: argparse.Namespace, positions: int, **more: Any) -> Qwen3ForCausalLM:
    """A random model in fp32 of `settings.vocabulary`, `hidden` and `layers`; `more` goes into its configuration."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // 64,
        num_key_value_heads=max(settings.hidden // 128, 1),
        head_dim=64,
        max_position_embeddings=positions,
        **more,
    )
    return Qwen3ForCausalLM(config)


def commit() -> str:
    """The commit that runs, with a + where files differ from it; empty outside of a clone."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def write_report(options: argparse.Namespace, benchmark: str, device: str | None = None, **parts: Any) -> None:
    """Write `options.output`: the other options, `parts`, commit, machine (and `device`, if one is named), versions."""
    report = {
        "benchmark": benchmark,
        "commit": commit(),
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
        **parts,
        "machine": machine() | ({} if device is None else {"device": device}),
        "versions": package_versions(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"Written to {options.output}")


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
