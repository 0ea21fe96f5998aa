"""The sections of the demo's HTML report."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.report.html import Example, Figure, Section, ShadedText, ShadedTexts
from qscope_posttrain.report.plots import Bar, Curve, Mark, interval_bars, line_curves, scatter_with_intervals
from qscope_posttrain.report.tables import Table
from qscope_posttrain.testbed.arms import ARMS
from qscope_posttrain.testbed.contexts import FeatureContexts, feature_contexts
from qscope_posttrain.testbed.experiment import SFT, Experiment, MethodResult
from qscope_posttrain.testbed.tables import relative_cost
from qscope_posttrain.text.scripts import target_script

_EXAMPLES = 8
_CONTEXT_WINDOWS = 200
_CONTEXT_FEATURES = 2
_SEED = 5


def build_sections(experiment: Experiment, features: FeatureSet, tables: Mapping[str, Table]) -> list[Section]:
    """All sections, in the order of the chain; `tables` are those that the demo prints."""
    return [
        Section(
            "Unexpected switching by method",
            _methods_text(experiment),
            tables=[tables["sampled"], tables["teacher_forced"]],
            figures=[_switching_plot(experiment), _trade_off_plot(experiment)],
        ),
        _examples_section(experiment),
        Section(
            "Features",
            "Features are ranked by monolinguality: mean activation on one language minus the mean over the others.",
            tables=[tables["features"]],
            shaded=_shaded(experiment, features),
            sections=[Section("Are the features causal?", tables=[tables["causal_check"]])],
        ),
        Section("Training", figures=[*_loss_plots(experiment)], tables=[tables["runs"], *_optional(tables, "tuning")]),
        Section("The model", tables=[tables["model"]], figures=[_pretraining_plot(experiment)]),
    ]


def _methods_text(experiment: Experiment) -> str:
    config = experiment.config
    where = (
        "chosen on validation prompts in this run"
        if experiment.tuning is not None
        else "recorded in the package; they were chosen on validation prompts of the generated corpus"
    )
    lines = [
        f"The language model was pretrained with a habit: {100 * config.switch:g} % of the passages in other languages "
        f"turn into {config.target} at a random character. Each method then fine-tunes it on "
        f"{config.sft_windows} {'contaminated' if config.sft_switch else 'clean'} windows with the same data, order "
        f"and optimiser. Weights are {where}; the numbers are from test prompts.",
        "",
    ]
    lines += [f"- **{ARMS[result.name].title}**: {ARMS[result.name].description}" for result in experiment.methods]
    lines += [
        "",
        "Read switching together with perplexity: a damaged model switches more. Random features show what penalising "
        "anything does; difference of means and token penalty show what can be had without an SAE.",
    ]
    return "\n".join(lines)


def _switching_plot(experiment: Experiment) -> Figure:
    bars = []
    for result in (experiment.base, *experiment.methods):
        micro = result.switching.micro
        bars.append(Bar(result.title, micro.estimate, micro.low, micro.high, result.ratio_per_seed))
    svg = interval_bars(bars, "responses that switch", percent=True, reference=experiment.method(SFT).title)
    return Figure(svg, "Share of sampled responses with any character of the target's script; 95 % bootstrap intervals "
                       "over prompts, dots: seeds.")  # fmt: skip


def _trade_off_plot(experiment: Experiment) -> Figure:
    reference = experiment.method(SFT)
    marks = []
    for result in experiment.methods:
        pairs = [
            (relative_cost(run.metrics, sft.metrics), run.metrics.hz / sft.metrics.hz - 1)
            for run, sft in zip(result.runs, reference.runs, strict=True)
        ]
        costs, changes = [cost for cost, _ in pairs], [change for _, change in pairs]
        several = len(pairs) > 1
        marks.append(
            Mark(
                result.title,
                sum(costs) / len(costs),
                sum(changes) / len(changes),
                (min(costs), max(costs)) if several else None,
                (min(changes), max(changes)) if several else None,
            )
        )
    svg = scatter_with_intervals(
        marks, "masked perplexity against SFT", "hazard of switching against SFT", x_percent=True, y_percent=True
    )
    return Figure(svg, "What a method gains (down) and what it costs (right); lines: range over seeds.")


def _loss_plots(experiment: Experiment) -> list[Figure]:
    losses, penalties = [], []
    for result in experiment.methods:
        losses.append(_mean_curve(result, "loss"))
        keys = [key for key in result.runs[0].history[0] if key.endswith("/penalty")]
        if keys and result.name != "token_penalty":
            penalties.append(_mean_curve(result, keys[0]))
    figures = [
        Figure(line_curves(losses, "step", "training loss"), "Cross-entropy plus weighted penalty, mean over seeds.")
    ]
    if penalties:
        svg = line_curves(penalties, "step", "penalty")
        figures.append(Figure(svg, "The penalty without its weight; its unit differs between methods."))
    return figures


def _mean_curve(result: MethodResult, key: str) -> Curve:
    series = [[float(entry[key]) for entry in run.history if key in entry] for run in result.runs]
    means = [sum(values) / len(values) for values in zip(*series, strict=True)]
    return Curve(result.title, list(range(1, len(means) + 1)), means)


def _pretraining_plot(experiment: Experiment) -> Figure:
    losses = experiment.language_model.losses
    size = max(1, len(losses) // 100)
    means = [
        sum(losses[start : start + size]) / len(losses[start : start + size]) for start in range(0, len(losses), size)
    ]
    steps = [start + size for start in range(0, len(losses), size)]
    return Figure(line_curves([Curve("loss", steps, means)], "step", "nats per token"), "Pretraining loss.")


def _shaded(experiment: Experiment, features: FeatureSet) -> list[ShadedTexts]:
    config, layer = experiment.config, experiment.config.tapped_layers[-1]
    rows = features.select(language=config.target, layers=[layer], top=min(config.top, _CONTEXT_FEATURES)).layers[layer]
    windows = experiment.language_model.maker.dialogue("val", _CONTEXT_WINDOWS, _SEED)
    found = feature_contexts(
        experiment.language_model, experiment.dictionaries.saes[layer], layer, rows.feature_ids.tolist(), windows
    )
    return [
        ShadedTexts(
            f"{name}: strongest on {_token_list(contexts)}",
            [ShadedText(passage.tokens, passage.activations) for passage in contexts.passages],
        )
        for name, contexts in zip(rows.names, found, strict=True)
    ]


def _token_list(contexts: FeatureContexts) -> str:
    return ", ".join(repr(token) for token, _ in contexts.tokens)


def _examples_section(experiment: Experiment) -> Section:
    """The same random prompts before SFT, after SFT, and after each form of SASFT."""
    shown = [experiment.base, *(result for result in experiment.methods if result.name.startswith(("sft", "sasft")))]
    first = [[s for s in result.switching.samples if s.sample_index == 0] for result in shown]
    chosen = random.Random(_SEED).sample(range(len(first[0])), min(_EXAMPLES, len(first[0])))
    script = target_script(experiment.config.target)
    examples = [
        Example(
            first[0][index].prompt,
            {result.title: samples[index].response for result, samples in zip(shown, first, strict=True)},
            script,
        )
        for index in sorted(chosen)
    ]
    text = f"{len(examples)} prompts drawn at random, first seed; nothing was left out or picked by its content."
    return Section("Completions before and after", text, examples=examples)


def _optional(tables: Mapping[str, Table], name: str) -> Sequence[Table]:
    return [tables[name]] if name in tables else []
