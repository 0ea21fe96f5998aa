"""The sections of the report on endless repetition."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from qscope_posttrain.report.html import Example, Figure, Section
from qscope_posttrain.report.plots import Bar, Curve, interval_bars, line_curves
from qscope_posttrain.report.tables import Table
from qscope_posttrain.testbed.arithmetic.arms import ARMS
from qscope_posttrain.testbed.arithmetic.experiment import PLAIN, ArithmeticExperiment, ArmResult
from qscope_posttrain.testbed.arithmetic.tokenizer import decode_words

_EXAMPLES = 4
_SEED = 5


def build_arithmetic_sections(experiment: ArithmeticExperiment, tables: Mapping[str, Table]) -> list[Section]:
    """Sections in the order of the chain; `tables` are those that the demo prints."""
    return [
        Section(
            "Endless repetition by method",
            _methods_text(experiment),
            tables=[tables["repetition_sampled"], tables["repetition_probes"]],
            figures=[_loops_plot(experiment), _probe_plot(experiment), _accuracy_plot(experiment)],
            sections=[
                Section("The negatives", tables=[tables["negatives"]], figures=[_looped_plot(experiment)]),
                Section("Repetition features", tables=_features_tables(tables)),
                Section(
                    "Loops of the start model",
                    "Completions that it wrote by itself, drawn at random among those that repeat to the limit.",
                    examples=_examples(experiment),
                ),
                Section("Every run", tables=[tables["repetition_start"], tables["repetition_runs"]]),
            ],
        )
    ]


def _features_tables(tables: Mapping[str, Table]) -> list[Table]:
    return [tables[name] for name in ("repetition_features", "steering_curve", "steering_curve_to_end")]


def _methods_text(experiment: ArithmeticExperiment) -> str:
    config, loops = experiment.config, experiment.loops.collection
    lines = [
        f"A small model that solves sums step by step was pretrained on documents some of which repeat a step without "
        f"end: {len(loops.loops)} of {loops.samples} of its samples do so too. Each method then trains it for "
        f"{config.updates} updates of {config.prompts_per_update} prompts x {config.rows_per_prompt} rows with the "
        "same prompts, reward (1 for the right answer, DAPO's soft overlong punishment) and optimiser. Loops are so "
        "rare that ordinary sampling hardly ever finds one.",
        "",
    ]
    lines += [f"- **{ARMS[result.name].title}**: {ARMS[result.name].description}" for result in experiment.arms]
    lines += [
        "",
        "Read loops together with accuracy: both are sampled on held-out problems. The probes ask how likely each "
        "model is to continue the start model's own loops; they know these loops only.",
    ]
    return "\n".join(lines)


def _loops_plot(experiment: ArithmeticExperiment) -> Figure:
    bars = []
    for result in (experiment.start, *experiment.arms):
        rate = result.loop_rate
        seeds = tuple(run.quality.loops / run.quality.samples for run in result.runs)
        bars.append(Bar(result.title, rate.estimate, rate.low, rate.high, seeds))
    svg = interval_bars(bars, "samples that repeat without end", percent=True, reference=experiment.arm(PLAIN).title)
    return Figure(svg, "Share of sampled completions that repeat to the length limit; 95 % Wilson intervals over all "
                       "samples, dots: seeds.")  # fmt: skip


def _accuracy_plot(experiment: ArithmeticExperiment) -> Figure:
    bars = []
    for result in (experiment.start, *experiment.arms):
        accuracy = result.accuracy
        seeds = tuple(run.quality.right / run.quality.samples for run in result.runs)
        bars.append(Bar(result.title, accuracy.estimate, accuracy.low, accuracy.high, seeds))
    svg = interval_bars(bars, "right answers", percent=True, reference=experiment.arm(PLAIN).title)
    return Figure(svg, "Share of right answers in the same samples: the price of the method.")


def _probe_plot(experiment: ArithmeticExperiment) -> Figure:
    curves = []
    for result in experiment.arms:
        steps = sorted(result.runs[0].probes)
        means = [sum(run.probes[step].oend for run in result.runs) / len(result.runs) for step in steps]
        curves.append(Curve(result.title, steps, means))
    svg = line_curves(curves, "update", "P(endless | entered)", percent=True)
    return Figure(svg, "Probability of going on to the end, on the start model's own loops; mean over seeds.")


def _looped_plot(experiment: ArithmeticExperiment) -> Figure:
    curves = [_mean_curve(result) for result in experiment.arms if result.name != PLAIN]
    svg = line_curves([curve for curve in curves if curve.y], "update", "negatives that loop", percent=True)
    caption = (
        "Share of the negatives that end in endless repetition, mean over seeds and five updates: it falls as the "
        "policy unlearns what provokes it."
    )
    return Figure(svg, caption)


def _mean_curve(result: ArmResult, size: int = 5) -> Curve:
    series = [[float(entry.get("negative/looped", 0.0)) for entry in run.history] for run in result.runs]
    means = [sum(values) / len(values) for values in zip(*series, strict=True)]
    starts = range(0, len(means), size)
    smooth = [sum(means[start : start + size]) / len(means[start : start + size]) for start in starts]
    return Curve(result.title, [min(start + size, len(means)) for start in starts], smooth)


def _examples(experiment: ArithmeticExperiment) -> Sequence[Example]:
    tokenizer, loops = experiment.language_model.tokenizer, experiment.loops.collection.loops
    chosen = random.Random(_SEED).sample(range(len(loops)), min(_EXAMPLES, len(loops)))
    return [
        Example(
            " ".join(decode_words(tokenizer, loops[index].prompt_ids)),
            {"start model": " ".join(decode_words(tokenizer, loops[index].completion_ids))},
            "",
        )
        for index in sorted(chosen)
    ]
