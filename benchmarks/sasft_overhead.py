"""Measure how much SASFT adds to a training step: time and peak memory over plain `SFTTrainer`.

    python benchmarks/sasft_overhead.py [--layers 4] [--rounds 30] [--device cpu|cuda] ...

One process trains a random Qwen3 on random tokens. In every round plain SFT and each variant of SASFT take one step
on the same batch, in an order that rotates from round to round, so that drifts of the machine meet all of them. A
round gives one ratio per variant; reported are the median ratio and a bootstrap interval over rounds. Processor time
is given beside wall time: on a busy machine only the first can be trusted. Peak memory is measured in a process of its
own per variant: `torch.cuda.max_memory_allocated` on CUDA, the highest resident set on the CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from interleaved import random_qwen3, write_report
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.provenance import model_identity
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.config import PAPER

LANGUAGES = ("en", "zh", "fr")
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "paper's form, 2 features x 2 layers": {**PAPER, "top": 2},
    "8 features x 2 layers, decoder": {"top": 8, "combine": "none"},
    "one combined readout, last layer": {"combine": "effect", "last": True},
}
DEFAULT_RESULTS = Path(__file__).parent / "results" / "sasft_overhead.json"


def build_model(settings: argparse.Namespace) -> Qwen3ForCausalLM:
    return random_qwen3(settings, settings.length, pad_token_id=0, eos_token_id=1, bos_token_id=None)


def build_features(model: Qwen3ForCausalLM, rows: int = 32) -> FeatureSet:
    """Random rows on the last two layers: what they mean does not matter for their cost."""
    generator = torch.Generator().manual_seed(0)
    d_model, count = model.config.hidden_size, len(LANGUAGES)
    directions = torch.randn(rows, d_model, generator=generator) / d_model**0.5
    features = LayerFeatures(
        feature_ids=torch.arange(rows),
        labels=("zh",) * rows,
        names=tuple(f"zh #{i}" for i in range(rows)),
        encoder=directions,
        encoder_bias=torch.zeros(rows),
        decoder=directions.clone(),
        scores=torch.linspace(2, 1, rows),
        effects=torch.linspace(1, 0.5, rows),
        mean_activation=torch.zeros(count, rows),
        firing_rate=torch.zeros(count, rows),
        tokens=torch.full((count,), 1000),
        mean_residual=torch.zeros(count, d_model),
        residual_median_norm=1.0,
        encoder_mean=torch.zeros(count, rows),
        encoder_covariance=torch.eye(rows).expand(count, -1, -1).contiguous(),
        decoder_mean=torch.zeros(count, rows),
        decoder_covariance=torch.eye(rows).expand(count, -1, -1).contiguous(),
    )
    last = model.config.num_hidden_layers - 1
    return FeatureSet(model_identity(model), LANGUAGES, {last - 1: features, last: features})


def build_dataset(settings: argparse.Namespace) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(settings.batch):
        ids = torch.randint(2, settings.vocabulary, (settings.length,), generator=generator).tolist()
        prompt = settings.length // 4
        rows.append(
            {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "language": LANGUAGES[i % len(LANGUAGES)]}
        )
    return Dataset.from_list(rows)


class Bench:
    """One trainer after a warm-up step, on which single steps are taken with and without SASFT."""

    def __init__(self, settings: argparse.Namespace) -> None:
        torch.set_num_threads(settings.threads)
        tokenizer = Tokenizer(models.BPE({"p": 0, "e": 1}, []))
        self.settings = settings
        self.model = build_model(settings)
        self.features = build_features(self.model)
        self.trainer = SFTTrainer(
            model=self.model,
            args=SFTConfig(
                output_dir=tempfile.mkdtemp(),
                max_steps=1,
                learning_rate=0.0,
                optim="sgd",
                per_device_train_batch_size=settings.batch,
                gradient_checkpointing=settings.checkpointing,
                bf16=settings.bf16,
                use_cpu=settings.device == "cpu",
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=build_dataset(settings),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="p", eos_token="e"),
        )
        self.trainer.train()

    def step(self, variant: str) -> tuple[float, float]:
        """Wall and processor seconds of forward, penalty and backward of one step."""
        options = VARIANTS[variant]
        if options is None:
            return self._timed()
        chosen = dict(options)
        layers = tuple(self.features.layers)[-1:] if chosen.pop("last", False) else None
        with SASFTCallback(self.features, layers=layers, **chosen).attach(self.trainer):
            return self._timed()

    def _timed(self) -> tuple[float, float]:
        trainer = self.trainer
        batch = next(iter(trainer.get_train_dataloader()))
        count = (batch["labels"][:, 1:] != -100).sum()
        self._synchronise()
        wall, processor = time.perf_counter(), time.process_time()
        trainer.training_step(trainer.model_wrapped, batch, num_items_in_batch=count)
        self._synchronise()
        elapsed = time.perf_counter() - wall, time.process_time() - processor
        self.model.zero_grad()
        return elapsed

    def _synchronise(self) -> None:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()


def peak_memory(settings: argparse.Namespace, variant: str) -> float:
    """MiB at the peak of three steps, in a process that does nothing else: allocated on CUDA, else resident."""
    bench = Bench(settings)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        bench.step(variant)
    if settings.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def bootstrap_median(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the median."""
    generator = torch.Generator().manual_seed(0)
    table = torch.tensor(values, dtype=torch.float64)
    index = torch.randint(len(values), (draws, len(values)), generator=generator)
    medians = table[index].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    names = list(VARIANTS)
    memory: dict[str, float] = {}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[name] = pool.apply(peak_memory, (settings, name))
    bench = Bench(settings)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(-1, settings.rounds):  # the first round warms up
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = bench.step(name)
            if turn >= 0:
                seconds[name].append(elapsed)
        if turn >= 0:
            ratios = [f"{seconds[name][-1][0] / seconds['plain'][-1][0]:.4f}" for name in names[1:]]
            plain = seconds["plain"][-1][0]
            print(f"round {turn + 1}/{settings.rounds}: plain {plain:.3f} s, ratios {', '.join(ratios)}", flush=True)
    return {
        name: {
            "wall": paired([s[0] for s in seconds[name]], [s[0] for s in seconds["plain"]]),
            "processor": paired([s[1] for s in seconds[name]], [s[1] for s in seconds["plain"]]),
            "peak_memory_mib": memory[name],
            "peak_memory_ratio": memory[name] / memory["plain"],
        }
        for name in names
    }


def paired(values: list[float], plain: list[float]) -> dict[str, Any]:
    """Median time, and the median of the rounds' ratios to plain SFT with its interval."""
    ratios = [a / b for a, b in zip(values, plain, strict=True)]
    return {
        "median_seconds": statistics.median(values),
        "median_ratio": statistics.median(ratios),
        "ratio_interval_95": bootstrap_median(ratios),
        "ratios": ratios,
    }


def with_interval(ratio: dict[str, Any]) -> str:
    low, high = ratio["ratio_interval_95"]
    return f"{ratio['median_ratio']:.4f} ({low:.4f} to {high:.4f})"


def parse_settings(results: Path = DEFAULT_RESULTS) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=results)
    return parser.parse_args()


def main() -> None:
    settings = parse_settings()
    results = measure(settings)
    table = Table(
        title=f"SASFT over plain SFT: Qwen3 {settings.layers} layers, hidden {settings.hidden}, "
        f"{settings.batch * settings.length} tokens a step, {settings.device}",
        columns=["variant", "step [s]", "time ratio", "processor time ratio", "peak memory [MiB]", "memory ratio"],
        rows=[
            [
                name,
                f"{r['wall']['median_seconds']:.4f}",
                with_interval(r["wall"]),
                with_interval(r["processor"]),
                f"{r['peak_memory_mib']:.0f}",
                f"{r['peak_memory_ratio']:.4f}",
            ]
            for name, r in results.items()
        ],
        caption=f"Medians over {settings.rounds} paired rounds, with 95 % bootstrap intervals.",
    )
    table.print()
    device = torch.cuda.get_device_name() if settings.device == "cuda" else "cpu"
    write_report(settings, "sasft_overhead", device, results=results, table=table.to_dict())


if __name__ == "__main__":
    main()
