"""The testbed's tables: the model and its SAEs, the chosen features, the methods."""

from __future__ import annotations

from qscope_posttrain.evaluation.code_switching import switching_difference
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.testbed.experiment import SFT, Experiment, MethodResult
from qscope_posttrain.testbed.metrics import Metrics


def model_table(experiment: Experiment) -> Table:
    """Sizes and fit."""
    language_model, metrics = experiment.language_model, experiment.base.metrics
    parameters = sum(parameter.numel() for parameter in language_model.model.parameters())
    tokens = {language: len(text.tokens) for language, text in language_model.maker.encoded["pre"].items()}
    rows: list[list[Cell]] = [
        ["parameters of the language model", f"{parameters:,}"],
        ["pretraining tokens in the corpus", ", ".join(f"{name} {count:,}" for name, count in tokens.items())],
        ["perplexity of responses, other languages / target", f"{metrics.ppl:.2f} / {metrics.target_ppl:.2f}"],
        ["responses that switch, before SFT", f"{100 * experiment.base.switching.ratio:.1f} %"],
    ]
    for layer, share in experiment.dictionaries.explained_variance.items():
        sae = experiment.dictionaries.saes[layer]
        rows.append([f"SAE of layer {layer}: {sae.d_sae} latents, explained variance", f"{share:.3f}"])
    return Table("Language model and SAEs", ["what", "measured"], rows)


def firing_table(features: FeatureSet, layer: int, per_language: int = 3) -> Table:
    """The top features of each language in one layer, and the share of tokens on which they fire in every language."""
    rows: list[list[Cell]] = []
    for language in features.languages:
        chosen = features.select(language=language, layers=[layer], top=per_language).layers[layer]
        for index, name in enumerate(chosen.names):
            rates = [float(rate) for rate in chosen.firing_rate[:, index]]
            effect = float(chosen.effects[index])
            rows.append([name, float(chosen.scores[index]), *rates, effect])
    columns = ["feature", "monolinguality", *(f"fires on {language}" for language in features.languages), "effect"]
    caption = (
        "Share of tokens on which a feature is active. Effect: change of the target's mean log-probability per unit of "
        "the feature's direction (target features only)."
    )
    return Table(f"Top features per language, layer {layer}", columns, rows, caption)


def results_table(experiment: Experiment) -> Table:
    """The methods side by side: sampled switching with its interval, teacher-forced metrics, cost."""
    reference = experiment.method(SFT)
    rows = [_result_row(result, reference) for result in (experiment.base, *experiment.methods)]
    config = experiment.config
    columns = [
        "method",
        "weight",
        "switched, %",
        "95 %",
        "per seed",
        "against SFT, points",
        "hazard x 1e3",
        "hazard, %",
        "expected, %",
        "masked ppl, %",
        "ppl",
        f"{config.target} ppl",
        "step, ms",
    ]
    prompts = sum(language.prompts for language in reference.switching.languages)
    caption = (
        f"{prompts} test prompts, one sample a seed (seeds {', '.join(map(str, config.seeds))}), "
        f"{config.sampled_tokens} tokens at temperature {config.temperature:g}; intervals: bootstrap over prompts, "
        f"paired for differences. Teacher forced on {config.evaluation_windows} test windows: hazard = mean "
        "probability of target-script tokens at a position; expected = share of responses expected to switch; masked "
        "ppl = perplexity with these tokens taken out. Signs and percentages are changes against SFT."
    )
    return Table("Unexpected switching by method", columns, rows, caption)


def seeds_table(experiment: Experiment) -> Table:
    """Every run by itself."""
    rows: list[list[Cell]] = []
    for result in experiment.methods:
        for run, ratio in zip(result.runs, result.ratio_per_seed, strict=True):
            m = run.metrics
            rows.append(
                [result.title, run.job.seed, 100 * ratio, 1000 * m.hz, 100 * m.csx, m.masked_ppl, m.ppl, m.target_ppl]
            )
    columns = ["method", "seed", "switched, %", "hazard x 1e3", "expected, %", "masked ppl", "ppl", "target ppl"]
    return Table("Every run", columns, rows)


def relative_cost(metrics: Metrics, reference: Metrics) -> float:
    """Rise of masked perplexity as a share."""
    return metrics.masked_ppl / reference.masked_ppl - 1


def _result_row(result: MethodResult, reference: MethodResult) -> list[Cell]:
    metrics, sft = result.metrics, reference.metrics
    micro = result.switching.micro
    difference = None
    if result is not reference:
        change = switching_difference(result.switching, reference.switching)
        difference = f"{100 * change.estimate:+.1f} ({100 * change.low:+.1f} .. {100 * change.high:+.1f})"
    return [
        result.title,
        result.weight or None,
        round(100 * micro.estimate, 1),
        f"{100 * micro.low:.1f} .. {100 * micro.high:.1f}",
        " ".join(f"{100 * ratio:.1f}" for ratio in result.ratio_per_seed),
        difference,
        1000 * metrics.hz,
        None if result is reference else f"{100 * (metrics.hz / sft.hz - 1):+.1f}",
        round(100 * metrics.csx, 1),
        None if result is reference else f"{100 * relative_cost(metrics, sft):+.2f}",
        metrics.ppl,
        metrics.target_ppl,
        round(1000 * sum(run.step_seconds for run in result.runs) / len(result.runs)) or None,
    ]
