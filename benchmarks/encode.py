"""Encoding with a TopK SAE: ours against the encoders of sae-lens, eai-sparsify and dictionary-learning themselves.

All are called as their users call them (`encode`), on the same weights and the same x (values of a bfloat16 residual
stream), interleaved in one process; each round runs every encoder once. Time is wall-clock, and CPU time of the
process, which other load disturbs less. Recall is against the k largest of a float64 product on 256 tokens. Memory is
that of one call beyond what lay in memory before it (VmHWM - RSS), each in a process of its own. "product" is the
matrix product alone, in our tiles, without any selection: no encoder can be faster by more than its tiles are worse.

    pip install -e .[bench]
    python benchmarks/encode.py [--tokens 8192] [--rounds 5] [--threads 2] [--no-sweep] [--no-memory]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.kernels import certified_encode, certified_weights, native, topk_encode
from qscope_posttrain.kernels.select import preactivation_tiles, tile_shape
from qscope_posttrain.provenance import machine, package_versions
from qscope_posttrain.report.tables import Table

ROOT = Path(__file__).resolve().parents[1]
Encode = Callable[[Tensor], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = ("sparsify", "sae-lens", "dictionary-learning")
COMPARED = {
    "fp32": ("product fp32", "ours fp32", "ours certified", *(f"{peer} fp32" for peer in PEERS)),
    "bf16": ("product bf16", "ours bf16", *(f"{peer} bf16" for peer in PEERS)),
}
RECALL_TOKENS = 256


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(extra_memory(options, options.memory_of)))
        return 0
    result: dict[str, Any] = {"benchmark": "encode", "settings": settings(options), "native": native.enabled()}
    for precision, names in COMPARED.items():
        result[precision] = compare(options, names)
        table(precision, result[precision], options).print()
    if options.memory:
        result["extra_memory_mb"] = {
            name: memory_in_a_process(options, name) for names in COMPARED.values() for name in names
        }
        rows = [[name, f"{size:.0f}"] for name, size in result["extra_memory_mb"].items()]
        Table("Memory of one call, beyond what lay there before", ["encoder", "MB"], rows).print()
    if options.sweep:
        result["sweep"] = sweep(options)
    result |= {"machine": machine(), "versions": package_versions() | peer_versions()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")
    if options.sweep:
        plot(result["sweep"], options.output.with_suffix(".svg"), options)
    return 0


def make_weights(options: argparse.Namespace, d_sae: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(options.seed)
    W_enc = torch.randn(d_sae, options.d_model, generator=generator).div_(options.d_model**0.5)
    return W_enc, torch.randn(d_sae, generator=generator) / 10


def make_x(options: argparse.Namespace, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(options.seed + 1)
    return torch.randn(tokens, options.d_model, generator=generator).bfloat16()


@torch.no_grad()
def build(name: str, W_enc: Tensor, b_enc: Tensor, k: int) -> Encode:
    """The encoder called `name`, holding only what encoding needs: x [tokens, d_model] -> what it returns."""
    kind, precision = name.rsplit(" ", 1)
    if precision == "certified":
        weights = certified_weights(W_enc, b_enc)
        return lambda x: certified_encode(x.float(), W_enc, b_enc, k, weights=weights)
    dtype = DTYPES[precision]
    W, b, (d_sae, d_model) = W_enc.to(dtype), b_enc.to(dtype), W_enc.shape
    if kind == "product":

        def product(x: Tensor) -> None:
            for _ in preactivation_tiles(x, W, b, dtype, *tile_shape(x, W, dtype, None, None)):
                pass

        return product
    if kind == "ours":
        return lambda x: topk_encode(x.to(dtype), W, b, k)
    if kind == "sparsify":
        from sparsify import SparseCoder, SparseCoderConfig

        coder = SparseCoder(d_model, SparseCoderConfig(num_latents=d_sae, k=k), dtype=dtype, decoder=False)
        coder.encoder.weight.data, coder.encoder.bias.data = W, b
        return lambda x: coder.encode(x.to(dtype))
    if kind == "sae-lens":
        from sae_lens import TopKSAE, TopKSAEConfig

        sae = TopKSAE(TopKSAEConfig(d_in=d_model, d_sae=d_sae, k=k, dtype=str(dtype).removeprefix("torch.")))
        sae.W_enc.data, sae.b_enc.data, sae.W_dec.data = W.T.contiguous(), b, W[:0].T
        return lambda x: sae.encode(x.to(dtype))
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    autoencoder = AutoEncoderTopK(d_model, d_sae, k).to(dtype)
    autoencoder.encoder.weight.data, autoencoder.encoder.bias.data = W, b
    autoencoder.decoder.weight.data = W[:0]
    return lambda x: autoencoder.encode(x.to(dtype))


def kept_features(code: Any, k: int) -> Tensor:
    """Indices [tokens, k] from what an encoder returns: dense activations, or something with indices."""
    if isinstance(code, Tensor):
        return code.float().topk(k, dim=1).indices
    return code.top_indices if hasattr(code, "top_indices") else code[1].long()


def recall(encode: Encode, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> float:
    x = x[:RECALL_TOKENS]
    truth = (x.double() @ W_enc.double().T + b_enc.double()).topk(k, dim=1).indices
    found = kept_features(encode(x), k)
    return float((found[:, :, None] == truth[:, None, :]).any(dim=2).float().mean())


@torch.no_grad()
def compare(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Times of every encoder in every round, and for each peer how many times faster ours is."""
    W_enc, b_enc = make_weights(options, options.d_sae)
    encoders = {name: build(name, W_enc, b_enc, options.k) for name in names}
    x = make_x(options, options.tokens)
    result: dict[str, Any] = {name: {} for name in names}
    for name, encode in encoders.items():
        encode(x[:RECALL_TOKENS])
        if not name.startswith("product"):
            result[name]["recall"] = recall(encode, x, W_enc, b_enc, options.k)
    if "ours certified" in encoders:
        result["ours certified"]["recomputed_rows"] = int(encoders["ours certified"](x).recomputed)
    rounds = [timed_round(encoders, x) for _ in range(options.rounds)]
    for name in names:
        for clock, place in (("wall_s", 0), ("cpu_s", 1)):
            result[name][clock] = spread([seconds[name][place] for seconds in rounds])
        if name.startswith(("ours", "product")):
            result[name]["times_faster_than"] = {
                peer: {
                    clock: spread([seconds[peer][place] / seconds[name][place] for seconds in rounds])
                    for clock, place in (("wall", 0), ("cpu", 1))
                }
                for peer in names
                if peer.startswith(PEERS)
            }
    return result


def timed_round(encoders: Mapping[str, Encode], x: Tensor) -> dict[str, tuple[float, float]]:
    seconds = {}
    for name, encode in encoders.items():
        wall, cpu = time.perf_counter(), time.process_time()
        encode(x)
        seconds[name] = (time.perf_counter() - wall, time.process_time() - cpu)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def table(precision: str, result: Mapping[str, Any], options: argparse.Namespace) -> Table:
    fastest = min((n for n in result if n.startswith(PEERS)), key=lambda n: result[n]["cpu_s"]["median"])
    rows = []
    for name, row in result.items():
        faster = row.get("times_faster_than", {}).get(fastest)
        ratios = [
            f"{faster[c]['median']:.2f} ({faster[c]['lowest']:.2f} .. {faster[c]['highest']:.2f})" for c in faster or ()
        ]
        times = [f"{row[clock]['median']:.3f}" for clock in ("wall_s", "cpu_s")]
        rows.append([name, *times, *(ratios or ["", ""]), f"{row['recall']:.4f}" if "recall" in row else ""])
    title = f"Encode in {precision}: {options.tokens} tokens, {options.d_model} x {options.d_sae}, k = {options.k}"
    columns = ["encoder", "wall, s", "CPU, s", f"x {fastest}, wall", "CPU", "recall"]
    return Table(title, columns, rows, caption="Median (lowest .. highest) of the rounds.")


@torch.no_grad()
def extra_memory(options: argparse.Namespace, name: str) -> float:
    """MB that one call adds to this process at its peak."""
    encode, x = build(name, *make_weights(options, options.d_sae), options.k), make_x(options, options.tokens)
    encode(x[:2])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before = resident("VmRSS")
    code = encode(x)
    peak = resident("VmHWM") - before
    del code
    return peak


def resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def memory_in_a_process(options: argparse.Namespace, name: str) -> float:
    sizes = [
        f"--{key.replace('_', '-')}={getattr(options, key)}" for key in ("tokens", "d_model", "d_sae", "k", "threads")
    ]
    command = [sys.executable, __file__, *sizes, "--memory-of", name]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(run.stdout.splitlines()[-1])


def sweep_points(options: argparse.Namespace) -> Iterator[tuple[str, int, int, int]]:
    """(what varies, tokens, d_sae, k): one of the three at a time."""
    for tokens in options.sweep_tokens:
        yield "tokens", tokens, options.d_sae, options.k
    for d_sae in options.sweep_widths:
        yield "d_sae", options.sweep_at, d_sae, options.k
    for k in options.sweep_k:
        yield "k", options.sweep_at, options.d_sae, k


@torch.no_grad()
def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds per token of the fastest peer, of ours and of the product alone: the least of the rounds."""
    names, points = ("product bf16", "ours bf16", "ours certified", "sparsify bf16"), []
    for varied, tokens, d_sae, k in sweep_points(options):
        weights, x = make_weights(options, d_sae), make_x(options, tokens)
        encoders = {name: build(name, *weights, k) for name in names}
        rounds = [timed_round(encoders, x) for _ in range(1 + options.sweep_rounds)][1:]
        least = {name: min(seconds[name][1] for seconds in rounds) * 1e6 / tokens for name in names}
        points.append({"varied": varied, "tokens": tokens, "d_sae": d_sae, "k": k, "cpu_us_per_token": least})
        print(points[-1], flush=True)
    return points


def plot(points: Sequence[Mapping[str, Any]], path: Path, options: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, varied in zip(figure.subplots(1, 3, sharey=True), ("tokens", "d_sae", "k"), strict=True):
        chosen = [point for point in points if point["varied"] == varied]
        for name in chosen[0]["cpu_us_per_token"] if chosen else ():
            style = {"color": "black", "linestyle": "--"} if name.startswith("product") else {"marker": "o"}
            label = "limit: the matrix product alone" if name.startswith("product") else name
            axes.plot([p[varied] for p in chosen], [p["cpu_us_per_token"][name] for p in chosen], label=label, **style)
        axes.set(xlabel=varied, xscale="log", yscale="log")
        axes.set_xticks([p[varied] for p in chosen], [str(p[varied]) for p in chosen], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("CPU time per token, us")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(
        f"TopK encode, d_model {options.d_model}, d_sae {options.d_sae}, k {options.k} unless varied", fontsize=10
    )
    figure.savefig(path)


def peer_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("sae-lens", "eai-sparsify", "dictionary-learning")}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in ("output", "memory_of")}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 8192), ("d-model", 2048), ("d-sae", 32768), ("k", 50), ("rounds", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sweep", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sweep-tokens", type=int, nargs="*", default=[128, 512, 2048, 8192])
    parser.add_argument("--sweep-widths", type=int, nargs="*", default=[32768, 65536, 131072])
    parser.add_argument("--sweep-k", type=int, nargs="*", default=[16, 50, 100, 200])
    parser.add_argument("--sweep-at", type=int, default=2048, help="tokens where width or k varies")
    parser.add_argument("--sweep-rounds", type=int, default=3)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "encode.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
