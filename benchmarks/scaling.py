"""Long runs: ten million tokens through the feature pass, and a million rows into `qscope sft`.

    python benchmarks/scaling.py features [--tokens 10000000]     # memory and throughput, million by million
    python benchmarks/scaling.py rows [--rows 1000000]            # seconds and memory until the first step

Results go to benchmarks/results/scaling_features.json and scaling_rows.json. The machine may be busy with other work:
throughput is in processor time, divided by that of one fixed batch, read and summed up in the same way after every few
others: what slows both down alike cancels out.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.feature_pass import read_texts, train_tokenizer
from benchmarks.interleaved import random_qwen3, write_report
from benchmarks.testbed.feature_sets import language_feature_set
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.features.sums import LayerSums
from qscope_posttrain.models.calibration import LanguageRows
from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.report.plots import Curve, line_curves
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

ROOT = Path(__file__).resolve().parents[1]
MILLION = 1_000_000
BATCHES_PER_REFERENCE = 5
TEXTS_PER_LANGUAGE = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    return {"features": features, "rows": rows}[options.part](options)


class Meter:
    """Counts the tokens that a model reads, and at every full `step` of them notes time and memory."""

    def __init__(self, model: nn.Module, saes: Mapping[int, SparseAutoencoder], padding: int, step: int) -> None:
        self.model, self.saes, self.padding, self.step = model, saes, padding, step
        self.marks: list[dict[str, float]] = []
        self._tokens = self._calls = self._references = 0
        self._in_references = 0.0
        self._copy = copy.deepcopy(model)  # a pass within a pass would meet the hooks of the first
        self._fixed = torch.randint(1, 500, (32, 128), generator=torch.Generator().manual_seed(0))
        width = int(model.config.hidden_size)
        self._sums = {layer: LayerSums.zeros(1, width, sae, True, torch.device("cpu")) for layer, sae in saes.items()}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        handle = self.model.get_input_embeddings().register_forward_pre_hook(self._count)
        try:
            yield
        finally:
            handle.remove()

    def _count(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self._calls % BATCHES_PER_REFERENCE == 0:
            self._refer()
        self._calls += 1
        if self._tokens >= self.step * len(self.marks):
            seconds = {"processor_s": time.process_time() - self._in_references, "wall_s": time.perf_counter()}
            references = {"references": self._references, "in_references_s": self._in_references}
            self.marks.append({"tokens": self._tokens, **seconds, **references, "resident_mib": resident_mib()})
        self._tokens += int((inputs[0] != self.padding).sum())

    def _refer(self) -> None:
        """Read the fixed batch and sum it up, in time that is not counted as the pass's."""
        started = time.process_time()
        states = forward_to_layer(self._copy, self.saes, input_ids=self._fixed)
        for layer, sae in self.saes.items():
            rows = states[layer].flatten(0, 1)
            self._sums[layer].add(rows, [LanguageRows(0, 0, len(rows))], float("inf"), sae)
        self._in_references += time.process_time() - started
        self._references += 1


def features(options: argparse.Namespace) -> int:
    """Run the pass, and compare the first million tokens with the last."""
    texts, _ = read_texts(TEXTS_PER_LANGUAGE)
    tokenizer = train_tokenizer(texts, 4096)
    passages = long_texts(texts, tokenizer, options.tokens)
    model = random_qwen3(options, positions=512).eval()
    layers = list(range(0, options.layers, 2))
    saes = {layer: random_sae(options, layer) for layer in layers}
    before = resident_mib()
    meter = Meter(model, saes, tokenizer.pad_token_id, MILLION // 10)
    with meter.measuring():
        found = collect_statistics(model, tokenizer, passages, saes, tokens_per_batch=4096, show_progress=False)
    total = int(next(iter(found.layers.values())).tokens.sum())
    blocks = by_million(meter.marks)
    first, last = (meter_costs(meter.marks, at) for at in (0, len(blocks) - 1))
    ratio = statistics.mean(last) / statistics.mean(first)
    low, high = bootstrap_ratio(first, last)
    write_report(
        options,
        "scaling_features",
        tokens_counted=total,
        resident_before_mib=before,
        blocks=blocks,
        cost_last_to_first={"ratio": ratio, "low": low, "high": high},
        highest_resident_mib=highest_mib(),
    )
    millions, memory = [row["million"] for row in blocks], [row["resident_mib"] for row in blocks]
    curves = [
        Curve("processor time per token", millions, [row["relative_cost"] for row in blocks]),
        Curve("resident memory", millions, [value / memory[0] for value in memory]),
    ]
    plot = line_curves(curves, "million tokens", "relative to the first million")
    options.output.with_suffix(".svg").write_text(plot, encoding="utf-8")
    print(f"cost of the last million to the first: {ratio:.3f} ({low:.3f} to {high:.3f})")
    return 0


def meter_costs(marks: Sequence[dict[str, float]], million: int) -> list[float]:
    """Cost per token of each tenth of a million, in readings of the fixed batch."""
    part = marks[10 * million : 10 * million + 11]
    return [
        _gain(a, b, "processor_s") / _gain(a, b, "tokens") * _gain(a, b, "references") / _gain(a, b, "in_references_s")
        for a, b in pairwise(part)
    ]


def _gain(first: dict[str, float], last: dict[str, float], name: str) -> float:
    return last[name] - first[name]


def by_million(marks: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for million in range((len(marks) - 1) // 10):
        first, last = marks[10 * million], marks[10 * million + 10]
        tokens = last["tokens"] - first["tokens"]
        cost = statistics.mean(meter_costs(marks, million))
        found.append(
            {
                "million": million + 1,
                "tokens_per_processor_s": tokens / (last["processor_s"] - first["processor_s"]),
                "tokens_per_wall_s": tokens / (last["wall_s"] - first["wall_s"]),
                "cost": cost,
                "relative_cost": cost / found[0]["cost"] if found else 1.0,
                "resident_mib": last["resident_mib"],
            }
        )
    return found


def bootstrap_ratio(first: Sequence[float], last: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the ratio of means, over tenths of a million."""
    draw = random.Random(0)
    ratios = sorted(
        statistics.mean(draw.choices(last, k=len(last))) / statistics.mean(draw.choices(first, k=len(first)))
        for _ in range(2000)
    )
    return ratios[50], ratios[-51]


def long_texts(texts: dict[str, list[str]], tokenizer: Any, tokens: int) -> dict[str, list[str]]:
    """Passages of one to twelve sentences, about `tokens` tokens in all, as many in each language."""
    draw = random.Random(0)
    found: dict[str, list[str]] = {}
    for language, lines in texts.items():
        per_line = statistics.mean(len(ids) for ids in tokenizer(lines)["input_ids"])
        left = tokens / len(texts) * 1.03
        found[language] = []
        while left > 0:
            chosen = draw.choices(lines, k=draw.randint(1, 12))
            found[language].append(" ".join(chosen))
            left -= per_line * len(chosen)
    return found


def random_sae(options: argparse.Namespace, layer: int) -> SparseAutoencoder:
    rows = torch.randn(16 * options.hidden, options.hidden) / options.hidden**0.5
    biases = {"b_enc": torch.zeros(16 * options.hidden), "b_dec": torch.zeros(options.hidden)}
    return SparseAutoencoder(W_enc=rows, W_dec=rows.clone(), activation=TopK(32), layer=layer, **biases)


def rows(options: argparse.Namespace) -> int:
    """Start `qscope sft` with a thousand and with many rows, streamed and in memory."""
    texts, _ = read_texts(TEXTS_PER_LANGUAGE)
    tokenizer = train_tokenizer(texts, 4096)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_qwen3(options, positions=512).eval()
        model.save_pretrained(folder / "model")
        tokenizer.eos_token = tokenizer.pad_token
        tokenizer.save_pretrained(folder / "model")
        sae = random_sae(options, 1)
        some = {language: lines[:200] for language, lines in texts.items()}
        found = collect_statistics(model, tokenizer, some, {1: sae}, show_progress=False)
        language_feature_set(found, {1: sae}, top=2).save(folder / "features.safetensors")
        measured = []
        for count in (1000, options.rows):
            data = folder / f"{count}.jsonl"
            write_lines(data, texts, count)
            for streamed in (True, False):
                measured.append(start(folder, data, count, streamed, options))
                print(measured[-1], flush=True)
        write_report(options, "scaling_rows", runs=measured)
    return 0


def write_lines(path: Path, texts: dict[str, list[str]], count: int) -> None:
    draw = random.Random(0)
    languages = sorted(texts)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            language = draw.choice(languages)
            text = " ".join(draw.choices(texts[language], k=2))
            file.write(json.dumps({"text": text, "language": language}, ensure_ascii=False) + "\n")


def start(folder: Path, data: Path, count: int, streamed: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Train twenty steps. The first step begins when `resolved.yaml` appears."""
    output = folder / f"run_{count}_{streamed}"
    words = f"""--model_name_or_path {folder / "model"} --features {folder / "features.safetensors"} --sasft_target zh
        --dataset_name {data} --dataset_streaming {streamed} --max_steps 20 --per_device_train_batch_size 8
        --max_length 64 --use_cpu true --bf16 false --gradient_checkpointing false --report_to none --save_strategy no
        --logging_steps 20 --learning_rate 1e-4 --disable_tqdm true --output_dir {output}"""
    command = [sys.executable, "-m", "qscope_posttrain", "sft", *words.split()]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "cache")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **own, "QSCOPE_QUIET": ""}
    began = time.perf_counter()
    log = (folder / "log.txt").open("w+")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    first = processor = at_first = 0.0
    highest = 0.0
    while process.poll() is None and (first or time.perf_counter() - began < options.patience):
        time.sleep(0.2)
        highest = max(highest, highest_mib(process.pid))
        if not first and (output / "resolved.yaml").exists():
            first, processor = time.perf_counter() - began, processor_seconds(process.pid)
            at_first = highest
    gave_up = process.poll() is None
    if gave_up:
        processor = processor_seconds(process.pid)
        process.terminate()
        process.wait()
    log.seek(0)
    said = log.read()
    if process.returncode != 0 and not gave_up:
        raise RuntimeError(said[-2000:])
    metrics = {} if gave_up else json.loads((output / "summary.json").read_text())["results"]["metrics"]
    share = re.findall(r"Tokenizing train dataset:\s+(\d+)%", said)
    return {
        "rows": count,
        "streamed": streamed,
        "first_step_s": first or None,
        "first_step_processor_s": processor,
        "given_up_after_s": options.patience if gave_up else None,
        "tokenized_percent": int(share[-1]) if gave_up and share else None,
        "twenty_steps_s": metrics.get("train_runtime"),
        "highest_mib_at_first_step": at_first,
        "highest_mib": highest,
        "hint": "--dataset_streaming true" in said,
    }


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int | str = "self") -> float:
    return _status_mib("VmRSS", pid)


def highest_mib(pid: int | str = "self") -> float:
    return _status_mib("VmHWM", pid)


def _status_mib(field: str, pid: int | str) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # the process has ended
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), 0.0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["features", "rows"])
    parser.add_argument("--tokens", type=int, default=10 * MILLION)
    parser.add_argument("--rows", type=int, default=MILLION)
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait for the first step (default 600)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    options.output = options.output or ROOT / "benchmarks" / "results" / f"scaling_{options.part}.json"
    return options


if __name__ == "__main__":
    sys.exit(main())
