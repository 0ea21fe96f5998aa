"""The pass behind `qscope analyze`: throughput with every layer tapped, and memory against the number of texts.

A model of the testbed's architecture with an SAE on each layer (random weights: the cost is the same) reads real
paragraphs, once for each number of tokens, each in a fresh process, so that the peak of resident memory is its own.
What is kept of a text is its feature ids at the last token: at most 4 k + 24 bytes a layer, and its characters.
Run with

    python -m benchmarks.analysis_pass [--tokens 100000] [--repeats 2] [--output benchmarks/results/analysis_pass.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.testbed.models import build_model
from qscope_posttrain.analysis.benchmarks.feature_sets import collect_item_features
from qscope_posttrain.analysis.benchmarks.items import BenchmarkItems
from qscope_posttrain.provenance import machine, package_versions
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ROOT.parent / "shared" / "data" / "react_docs"
SHARES = (0.25, 0.5, 1.0)
MIB = 1024**2


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        print(json.dumps(measure(options, options.worker)))
        return 0
    runs = []
    for repeat in range(options.repeats):
        for share in SHARES:  # the sizes in turn, so that other load on the machine falls on all of them
            found = in_new_process(options, int(share * options.tokens))
            runs.append(found)
            print(f"repeat {repeat + 1}: {found['tokens']} tokens, {found['tokens_per_s']:.0f} a second, "
                  f"peak {found['peak_mib']:.0f} MiB", flush=True)  # fmt: skip
    result = summarise(options, runs)
    table(result).print()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")
    return 0


def measure(options: argparse.Namespace, tokens: int) -> dict[str, float]:
    """One pass over about `tokens` tokens, in this process."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(options.vocabulary)
    model = build_model(
        tokenizer, hidden_size=options.hidden, layers=options.layers, heads=4, positions=512, seed=0
    ).eval()
    saes = {layer: build_sae(layer, options) for layer in range(options.layers)}
    texts, counted = take(tokenizer, tokens)
    collect(model, tokenizer, texts[:64], saes, options)  # whatever is allocated once
    before = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    found = collect(model, tokenizer, texts, saes, options)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    names = ("offsets", "indices", "texts", "units")
    kept = sum(getattr(part[0], name).nbytes for part in found.values() for name in names)
    return {
        "texts": len(texts),
        "tokens": counted,
        "seconds": wall,
        "cpu_seconds": cpu,
        "tokens_per_s": counted / wall,
        "tokens_per_cpu_s": counted / cpu,
        "peak_mib": peak() / MIB,
        "grown_mib": (peak() - before) / MIB,
        "kept_bytes_a_text_and_layer": kept / len(texts) / options.layers,
    }


def collect(
    model: Any, tokenizer: Any, texts: Sequence[str], saes: dict[int, SparseAutoencoder], options: argparse.Namespace
) -> dict[int, list]:
    items = BenchmarkItems("documents", tuple(texts), tuple(map(str, range(len(texts)))))
    return collect_item_features(
        model,
        tokenizer,
        [items],
        saes,
        max_length=512,
        items_at_once=options.items_at_once,
        show_progress=False,
    )


def take(tokenizer: Any, tokens: int) -> tuple[list[str], int]:
    """Paragraphs with at least this number of tokens together, and their number of tokens."""
    texts, counted = [], 0
    lines = paragraphs()
    while counted < tokens:
        part = [next(lines) for _ in range(200)]
        texts += part
        counted += sum(map(len, tokenizer(part)["input_ids"]))
    return texts, counted


def paragraphs() -> Iterator[str]:
    """Without end: real ones in five languages where the folder is there, else random words."""
    number = 0
    generator = torch.Generator().manual_seed(0)
    files = [iter(lines_of(path)) for path in sorted(DOCUMENTS.glob("*.txt"))] if DOCUMENTS.is_dir() else []
    while True:
        line = next(files[number % len(files)], None) if files else None
        number += 1
        if line is None:
            letters = torch.randint(24, (40, 5), generator=generator).tolist()
            line = " ".join("".join(chr(0x61 + letter) for letter in word) for word in letters)
        yield line


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    source = paragraphs()
    tokenizer.train_from_iterator([next(source) for _ in range(2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def build_sae(layer: int, options: argparse.Namespace) -> SparseAutoencoder:
    width = options.expansion * options.hidden
    encoder = torch.randn(width, options.hidden) / options.hidden**0.5
    biases = torch.zeros(width), torch.zeros(options.hidden)
    return SparseAutoencoder(encoder, biases[0], encoder.clone(), biases[1], TopK(options.k), layer)


def peak() -> int:
    """Largest resident size of this process so far, in bytes (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_new_process(options: argparse.Namespace, tokens: int) -> dict[str, float]:
    names = ("layers", "hidden", "vocabulary", "expansion", "k", "items_at_once")
    words = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    command = [sys.executable, "-m", "benchmarks.analysis_pass", "--worker", str(tokens), *words]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return result


def summarise(options: argparse.Namespace, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    by_size: dict[int, list[dict[str, float]]] = {}
    for found in runs:
        by_size.setdefault(int(found["tokens"]), []).append(found)
    sizes = []
    for _, same in sorted(by_size.items()):
        sizes.append({name: statistics.median(found[name] for found in same) for name in same[0]})
    first, last = sizes[0], sizes[-1]
    growth = (last["peak_mib"] - first["peak_mib"]) * MIB / (last["texts"] - first["texts"])
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "worker")}
    return {
        "benchmark": "analysis_pass",
        "settings": {**settings, "d_sae": options.expansion * options.hidden},
        "sizes": sizes,
        "peak_growth_bytes_a_text": growth,
        "runs": list(runs),
        "machine": machine(),
        "versions": package_versions(),
    }


def table(result: dict[str, Any]) -> Table:
    keys = ("texts", "tokens", "seconds", "tokens_per_s", "tokens_per_cpu_s", "peak_mib", "grown_mib")
    columns = ("texts", "tokens", "s", "tokens a second", "a CPU second", "peak, MiB", "grown in the pass, MiB")
    settings = result["settings"]
    kept = result["sizes"][-1]["kept_bytes_a_text_and_layer"]
    return Table(
        f"Analysis pass, {settings['layers']} layers tapped, d_sae {settings['d_sae']}, k {settings['k']}",
        columns,
        [[size[key] for key in keys] for size in result["sizes"]],
        f"Medians of {settings['repeats']} runs, each in a new process. Peak grows by "
        f"{result['peak_growth_bytes_a_text']:.0f} bytes a text from the smallest to the largest number of texts, of "
        f"which {kept * settings['layers']:.0f} are feature ids and the like.",
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the largest pass; the claim is on 1,000,000")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=3000)
    parser.add_argument("--expansion", type=int, default=16)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--items-at-once", type=int, default=256, help="texts whose activations are held at a time")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "analysis_pass.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
