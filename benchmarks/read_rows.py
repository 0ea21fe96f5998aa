"""Rows of a few features against the whole dictionary: wall time and memory, from files of about 2 GB.

    python benchmarks/read_rows.py [--latents 65536] [--width 4096] [--features 4] [--rounds 5] [--sparse]

Every reading is the first thing that a fresh process does after its imports; rows and whole dictionaries alternate.
Memory is the growth of the resident set beyond the imports, at its peak. "cached": the file lies in the page cache;
"from disk": its pages were dropped from the cache before. The files are of the sizes of Qwen-Scope for Qwen3-8B, in a
temporary folder, removed at the end: native (a feature is a row of the file in both matrices) and Qwen-Scope (a feature
is a column of W_dec). With --sparse they are full of holes in place of numbers: quick to make, but then nothing comes
from a disk. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from interleaved import write_report

from qscope_posttrain.report.tables import Table

GOAL = "under 0.2 s and 50 MB beyond the interpreter"

CHILD = """
import json, os, sys, time
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

def resident(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))

path, what, ids, cold = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4] == "cold"
if cold:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
open("/proc/self/clear_refs", "w").write("5")
before, started, processor = resident("VmRSS"), time.perf_counter(), time.process_time()
if what == "rows":
    SparseAutoencoder.rows(path, ids)
else:
    SparseAutoencoder.load(path, k=50, checksum=False)
seconds, processor = time.perf_counter() - started, time.process_time() - processor
print(json.dumps({"seconds": seconds, "processor": processor, "bytes": resident("VmHWM") - before}))
"""


def write_files(folder: Path, d_sae: int, d_model: int, sparse: bool) -> dict[str, Path]:
    """One file of each orientation, with holes or numbers."""
    shapes = {"W_enc": (d_sae, d_model), "W_dec": (d_sae, d_model), "b_enc": (d_sae,), "b_dec": (d_model,)}
    native, offset, header = folder / "layer0.sae.safetensors", 0, {}
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    described = {
        "version": 1,
        "activation": {"name": "topk", "k": 50, "variant": "relu_after"},
        "layer": 0,
        "source": {"location": "benchmark"},
    }
    header["__metadata__"] = {"qscope_posttrain.sae": json.dumps(described)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with native.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    qwen = folder / "layer0.sae.pt"
    empty = {name: torch.empty(shape) for name, shape in shapes.items()}
    empty["W_dec"] = torch.empty(d_model, d_sae)
    with torch.serialization.skip_data():
        torch.save(empty, qwen)
    if not sparse:
        _fill(native, [(8 + len(text), offset)])
        with zipfile.ZipFile(qwen) as archive:
            records = [r for r in archive.infolist() if "/data/" in r.filename]
            spans = [(r.header_offset + 30 + len(r.filename) + 64, r.file_size - 128) for r in records]
        _fill(qwen, spans)
    return {"native": native, "qwen_scope": qwen}


def _fill(path: Path, spans: list[tuple[int, int]]) -> None:
    block = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32).tobytes()
    with path.open("r+b") as file:
        for start, length in spans:
            start = (start + 3) // 4 * 4
            file.seek(start)
            for done in range(0, length, len(block)):
                file.write(block[: min(len(block), length - done) // 4 * 4])
        file.flush()
        os.fsync(file.fileno())


def measure(path: Path, what: str, ids: list[int], cache: str) -> dict[str, float]:
    arguments = [str(path), what, json.dumps(ids), cache]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=65536)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--features", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "read_rows.json")
    settings = parser.parse_args()
    ids = [int(i) for i in np.linspace(0, settings.latents - 1, settings.features)]
    runs: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="read_rows_") as folder:
        files = write_files(Path(folder), settings.latents, settings.width, settings.sparse)
        size = files["native"].stat().st_size
        for turn in range(settings.rounds):
            for cache in ("warm", "cold"):
                for name, path in files.items():
                    for what in ("whole", "rows"):  # the whole leaves the file in the cache
                        runs.setdefault((name, cache, what), []).append(measure(path, what, ids, cache))
            print(f"round {turn + 1}/{settings.rounds}", flush=True)
    rows = []
    for name in files:
        for cache, words in (("warm", "cached"), ("cold", "from disk")):
            part, whole = runs[name, cache, "rows"], runs[name, cache, "whole"]
            seconds = [run["seconds"] for run in part]
            ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(part, whole, strict=True))
            rows.append(
                [
                    f"{name}, {words}",
                    statistics.median(seconds),
                    max(seconds),
                    max(run["bytes"] for run in part) / 1e6,
                    statistics.median(run["seconds"] for run in whole),
                    max(run["bytes"] for run in whole) / 1e6,
                    ratio,
                ]
            )
    table = Table(
        f"Rows of {settings.features} features, far apart, of {settings.latents} x {settings.width} "
        f"({size / 1e9:.2f} GB{', sparse' if settings.sparse else ''})",
        ["file", "rows, s", "slowest, s", "rows, MB", "whole, s", "whole, MB", "whole / rows, time"],
        rows,
        f"Medians of {settings.rounds} rounds, fresh processes; MB: largest growth of the resident set. Goal for rows "
        f"that are cached: {GOAL}.",
    )
    table.print()
    by_way = {", ".join(key): values for key, values in runs.items()}
    write_report(settings, "read_rows", table=table.to_dict(), runs=by_way)


if __name__ == "__main__":
    main()
