"""The operators on a GPU: time against the usual ways, and the share of the device's limits that they reach.

    python benchmarks/gpu_kernels.py [--shapes 1.7B 8B] [--tokens 8192] [--output benchmarks/results/gpu_kernels.json]
    python benchmarks/gpu_kernels.py --device cpu --tiny          # a rehearsal, for machines without a GPU

Shapes are those of Qwen3 layers with Qwen-Scope dictionaries; weights are random. The limits are measured here as well:
bytes per second of a large copy, and operations per second of the pure matrix product of the encoder, tile by tile into
one buffer. Ways run in turn, each several times within a round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from interleaved import in_turn, ratios, write_report
from torch import Tensor

from qscope_posttrain.kernels import feature_penalty, sparse_decode, steer_add, topk_encode
from qscope_posttrain.report.tables import Table


class Shape(NamedTuple):
    d_model: int
    d_sae: int
    k: int


SHAPES = {"1.7B": Shape(2048, 32768, 50), "8B": Shape(4096, 65536, 50), "tiny": Shape(64, 512, 8)}
MATRIX_TILE = 1024


class Bench:
    """Random inputs of one shape on one device, and the timing of named ways."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options, self.shape = name, options, SHAPES[name]
        generator = torch.Generator().manual_seed(0)
        self.dtype = torch.bfloat16

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(options.device, self.dtype)

        d_model, d_sae, k = self.shape
        self.x = normal(options.tokens, d_model)
        self.W_enc, self.b_enc = normal(d_sae, d_model) / d_model**0.5, normal(d_sae) / 10
        self.W_dec, self.b_dec = normal(d_sae, d_model), normal(d_model)
        self.values = normal(options.tokens, k).abs().float()
        indices = torch.rand(options.tokens, d_sae // k, generator=generator).topk(k, dim=1).indices
        self.indices = indices.int().to(options.device)

    def times(self, ways: dict[str, Callable[[], object]], reference: str, repeats: int = 5) -> dict[str, Any]:
        """Seconds of one run of each way, and its ratio to `reference`."""

        def several(way: Callable[[], object]) -> Callable[[], object]:
            return lambda: [way() for _ in range(repeats)] and None

        seconds = in_turn({name: several(way) for name, way in ways.items()}, self.options.rounds)
        found = ratios(seconds, reference, "wall")
        for row in found.values():
            row["median_s"] /= repeats
        return found

    def extra_memory(self, way: Callable[[], object]) -> float:
        """MiB that one run allocates at its peak; NaN off CUDA."""
        if self.options.device != "cuda":
            return float("nan")
        way()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def bandwidth(self) -> float:
        """Bytes per second that a large copy reads and writes."""
        source = torch.zeros(2**28 if self.options.device == "cuda" else 2**22, dtype=torch.uint8)
        source = source.to(self.options.device)
        target = torch.empty_like(source)
        seconds = self.times({"copy": lambda: target.copy_(source)}, "copy")["copy"]["median_s"]
        return 2 * source.numel() / seconds

    def encode(self) -> dict[str, Any]:
        x, W_enc, b_enc, k = self.x, self.W_enc, self.b_enc, self.shape.k
        tiles = list(x.split(MATRIX_TILE))
        buffer = x.new_empty(len(tiles[0]), len(W_enc))

        def product() -> None:
            for tile in tiles:
                torch.mm(tile, W_enc.t(), out=buffer[: len(tile)])

        ways: dict[str, Callable[[], object]] = {
            "topk_encode": lambda: topk_encode(x, W_enc, b_enc, k),
            "relu + torch.topk": lambda: torch.relu(torch.addmm(b_enc, x, W_enc.t())).topk(k, dim=1),
            "matrix product alone": product,
        }
        found = self.times(ways, "topk_encode")
        operations = 2 * len(x) * W_enc.numel()
        for name, row in found.items():
            row["tflops"] = operations / row["median_s"] / 1e12
            row["extra_memory_mib"] = self.extra_memory(ways[name])
        return found | {"share_of_the_matrix_product": found["matrix product alone"]["ratio"]}

    def decode(self, bandwidth: float) -> dict[str, Any]:
        values, indices, W_dec, b_dec = self.values, self.indices, self.W_dec, self.b_dec
        tokens, k = values.shape
        narrow, wide = values.to(self.dtype), indices.long()

        def dense() -> Tensor:
            code = torch.zeros(tokens, len(W_dec), dtype=self.dtype, device=W_dec.device)
            return code.scatter_(1, wide, narrow) @ W_dec + b_dec

        found = self.times(
            {
                "sparse_decode": lambda: sparse_decode(values, indices, W_dec, b_dec),
                "dense": dense,
                "embedding_bag": lambda: torch.nn.functional.embedding_bag(
                    wide, W_dec, mode="sum", per_sample_weights=narrow
                ),
            },
            "sparse_decode",
        )
        moved = tokens * (k * (self.shape.d_model * 2 + 8) + self.shape.d_model * 2)
        found["sparse_decode"]["share_of_bandwidth"] = moved / found["sparse_decode"]["median_s"] / bandwidth
        return found

    def penalty(self, bandwidth: float) -> dict[str, Any]:
        x = self.x.clone().requires_grad_()
        mask = torch.ones(len(x), dtype=torch.bool, device=x.device)
        ways: dict[str, Callable[[], object]] = {}
        for features in (1, 16, 64):
            rows = self.W_enc[:features].float()
            zeros = torch.zeros(features, device=x.device)

            def ours(rows: Tensor = rows, zeros: Tensor = zeros) -> object:
                return torch.autograd.grad(feature_penalty(x, rows, zeros, zeros, mask).sums.sum(), x)

            def eager(rows: Tensor = rows, zeros: Tensor = zeros) -> object:
                return torch.autograd.grad(torch.relu(x.float() @ rows.T + zeros).sum(), x)

            ways[f"feature_penalty, F={features}"], ways[f"eager fp32, F={features}"] = ours, eager
        found = self.times(ways, "feature_penalty, F=1")
        for row in found.values():
            # x is read once, its gradient written once.
            row["share_of_bandwidth"] = 4 * x.numel() / row["median_s"] / bandwidth
        return found

    def steering(self, bandwidth: float) -> dict[str, Any]:
        hidden = self.x.clone().unsqueeze(0)
        directions = self.W_dec[:2].float()
        strengths = torch.ones(1, len(self.x), 2, device=hidden.device)
        found = self.times(
            {
                "steer_add": lambda: steer_add(hidden, directions, strengths),
                "eager": lambda: hidden + (strengths @ directions).to(hidden.dtype),
            },
            "steer_add",
        )
        found["steer_add"]["share_of_bandwidth"] = 4 * hidden.numel() / found["steer_add"]["median_s"] / bandwidth
        return found

    def run(self) -> dict[str, Any]:
        bandwidth = self.bandwidth()
        return {
            "shape": self.shape._asdict(),
            "bandwidth_gb_s": bandwidth / 1e9,
            "encode": self.encode(),
            "decode": self.decode(bandwidth),
            "penalty": self.penalty(bandwidth),
            "steering": self.steering(bandwidth),
        }


def rows(name: str, result: dict[str, Any]) -> list[list[object]]:
    """Table rows of one shape: everything that was timed."""
    return [
        [name, operator, way, 1e6 * row["median_s"], row["ratio"], row.get("tflops"), row.get("share_of_bandwidth")]
        for operator in ("encode", "decode", "penalty", "steering")
        for way, row in result[operator].items()
        if isinstance(row, dict)
    ]


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    results = {name: Bench(name, options).run() for name in options.shapes}
    table = Table(
        f"Operators, {options.tokens} tokens in bfloat16 on {device_name(options.device)}",
        ["shape", "operator", "way", "time, us", "times the first", "TFLOP/s", "share of bandwidth"],
        [row for name, result in results.items() for row in rows(name, result)],
        "Goals: topk_encode at least 1.8 times faster than relu + torch.topk, and at least 80 % of the rate of the "
        "matrix product alone.",
    )
    table.print()
    write(options, "gpu_kernels", results, table)
    return 0


def write(options: argparse.Namespace, benchmark: str, results: dict[str, Any], table: Table) -> None:
    write_report(options, benchmark, device_name(options.device), results=results, table=table.to_dict())


def parse(arguments: Sequence[str] | None, benchmark: str = "gpu_kernels") -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=["1.7B", "8B"], default=["1.7B", "8B"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tiny", action="store_true", help="a small shape and few rounds: does it run at all?")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / f"{benchmark}.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there; --device cpu --tiny rehearses the script without one")
    if options.tiny:
        options.shapes, options.tokens, options.rounds = ["tiny"], 96, 2
    return options


if __name__ == "__main__":
    sys.exit(main())
