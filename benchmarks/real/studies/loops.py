"""Study 1, second half: how often a chat model repeats itself without end, over temperature and length."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from benchmarks.real.page import shown
from benchmarks.real.texts import items, lines
from qscope_posttrain.evaluation.repetition import repeat_ratio
from qscope_posttrain.intervals import Interval
from qscope_posttrain.models.generation import Sample, SamplingSettings, generate_samples
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.report.tables import Table

CUTS = (64, 128, 256, 512)
"""Lengths to which responses are cut to see where loops begin, in tokens"""


def run(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(str(options.model), dtype="float32", device="cpu")
    settings = SamplingSettings(1, top_p=1.0, max_new_tokens=128 if options.quick else 512, batch_size=32)
    if options.quick:
        found = loops(model, tokenizer, settings, 8, (0.0,))
    else:
        found = loops(model, tokenizer, settings, 32, (0.0, 0.3, 0.7, 1.0))
    return {"tables": {"rates": table(found).to_dict()}, "temperatures": found}


def table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Endless loops by temperature and length, of {temperature: {length: result of `repeat_ratio`}}."""
    rows = []
    for temperature, lengths in found.items():
        for length, result in lengths.items():
            kinds = [percent(group["wilson"]) for group in result["groups"].values()]
            ended = f"{100 * result['ended'] / result['samples']:.0f}"
            rows.append([float(temperature), int(length), result["samples"], percent(result["wilson"]), *kinds, ended])
    names = [f"{name}, %" for name in next(iter(next(iter(found.values())).values()))["groups"]]
    caption = (
        "Share of responses that are in a loop when they are cut off; 95 % Wilson intervals, one response per prompt."
    )
    return Table("Endless loops", ["temperature", "tokens", "responses", "all, %", *names, "ended, %"], rows, caption)


def percent(interval: Mapping[str, float]) -> str:
    """An interval of a result as a dictionary, in per cent."""
    return shown(Interval(**interval), unit=100)


def questions(count: int) -> dict[str, list[str]]:
    """Real prompts of a chat model: word problems, and instructions about everyday sentences."""
    sentences_en = lines("tatoeba/en.txt")[:: max(1, len(lines("tatoeba/en.txt")) // count)][:count]
    asks = ("Write a short story that begins with: {}", "Explain in detail what this sentence means: {}",
            "List ten sentences that are similar to this one: {}", "Continue this conversation: {}")  # fmt: skip
    return {
        "word problems": [item["question"] for item in items("gsm8k_test")[1::2][:count]],
        "instructions": [asks[i % len(asks)].format(text) for i, text in enumerate(sentences_en)],
    }


def loops(model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: SamplingSettings, prompts: int,
          temperatures: Sequence[float]) -> dict[str, Any]:  # fmt: skip
    """Count endless repetition over temperature and length, on the same samples cut shorter."""
    found: dict[str, Any] = {}
    for temperature in temperatures:
        drawn = replace(
            settings, temperature=temperature, samples_per_prompt=1 if temperature == 0 else settings.samples_per_prompt
        )
        samples = generate_samples(model, tokenizer, questions(prompts), drawn, chat=True)
        found[f"{temperature:g}"] = {
            length: repeat_ratio([cut(sample, length) for sample in samples], settings=drawn.to_dict()).to_dict()
            for length in CUTS
            if length <= settings.max_new_tokens
        }
    return found


def cut(sample: Sample, length: int) -> Sample:
    """A response as it would be if `length` were the longest."""
    if len(sample.tokens) <= length:
        return sample
    return replace(sample, tokens=sample.tokens[:length], ended=False)
