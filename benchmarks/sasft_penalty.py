"""Measure how much the SASFT penalty costs by itself, as a share of a training step.

    python benchmarks/sasft_penalty.py [--rounds 5] ...

Paired steps (`sasft_overhead.py`) measure everything that attaching adds, but on a noisy machine their ratio spreads by
far more than the penalty costs. Here forward and backward of the penalty alone, on captured hidden states of the same
model and batch, alternate with forward and backward of a plain step; the share of the two times is reported, in
processor time, per round. What it leaves out: hooks, masks and the collator, a few dozen small operations a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import write_report
from sasft_overhead import LANGUAGES, VARIANTS, build_features, build_model, parse_settings

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.kernels import feature_penalty
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sft.callback import penalty_layers
from qscope_posttrain.sft.config import SASFTConfig
from qscope_posttrain.sft.loss import normalize

REPETITIONS = 20


def processor_seconds(function: Callable[[], None]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def penalty_step(features: FeatureSet, variant: str, hidden: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of a variant's penalty, repeated `REPETITIONS` times."""
    options = dict(VARIANTS[variant] or {})
    last = tuple(features.layers)[-1:] if options.pop("last", False) else None
    layers = penalty_layers(features, SASFTConfig(layers=last, **options))
    ids = torch.full(hidden.shape[:2], LANGUAGES.index("en"))
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool)

    def run() -> None:
        for _ in range(REPETITIONS):
            total = hidden.new_zeros(())
            for layer in layers:
                sums = feature_penalty(hidden, layer.rows, layer.bias, layer.thresholds, mask, groups=ids).sums
                share = {"features": len(sums), "num_tokens": mask.sum(), "normalization": "token_mean"}
                total = total + normalize(sums.sum(), **share)
            total.backward()

    return run


def main() -> None:
    settings = parse_settings(Path(__file__).parent / "results" / "sasft_penalty.json")
    torch.set_num_threads(settings.threads)
    model = build_model(settings).to(settings.device)
    features = build_features(model)
    ids = torch.randint(2, settings.vocabulary, (settings.batch, settings.length))
    hidden = torch.randn(settings.batch, settings.length, settings.hidden, requires_grad=True)

    def plain() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    variants = {name: penalty_step(features, name, hidden) for name in VARIANTS if name != "plain"}
    plain()
    shares: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(settings.rounds):
        step = processor_seconds(plain)
        for name, run in variants.items():
            shares[name].append(processor_seconds(run) / REPETITIONS / step)
        print(f"round {turn + 1}/{settings.rounds}: plain {step:.2f} s of processor time", flush=True)
    rows = [
        [name, 100 * statistics.median(values), 100 * min(values), 100 * max(values)] for name, values in shares.items()
    ]
    table = Table(
        f"The SASFT penalty alone, as a share of a step: Qwen3 {settings.layers} layers, hidden {settings.hidden}, "
        f"{settings.batch * settings.length} tokens, vocabulary {settings.vocabulary}",
        ["variant", "share, %", "lowest", "highest"],
        rows,
        f"Forward and backward of the penalty over forward and backward of the model, {settings.rounds} alternating "
        "rounds, processor time.",
    )
    table.print()
    write_report(settings, "sasft_penalty", table=table.to_dict())


if __name__ == "__main__":
    main()
