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


def sampled_table(experiment: Experiment) -> Table:
    """Sampled switching of every method with its interval, and its difference from SFT on the same prompts."""
    reference, config = experiment.method(SFT), experiment.config
    rows: list[list[Cell]] = []
    for result in (experiment.base, *experiment.methods):
        micro, change = result.switching.micro, switching_difference(result.switching, reference.switching)
        rows.append(
            [
                result.title,
                result.weight or None,
                round(100 * micro.estimate, 1),
                f"{100 * micro.low:.1f} .. {100 * micro.high:.1f}",
                ", ".join(f"{100 * ratio:.1f}" for ratio in result.ratio_per_seed),
                None if result is reference else f"{100 * change.estimate:+.1f}",
                None if result is reference else f"{100 * change.low:+.1f} .. {100 * change.high:+.1f}",
                None if result is reference else f"{100 * change.estimate / max(reference.switching.ratio, 1e-9):+.0f}",
            ]
        )
    columns = ["method", "weight", "switched, %", "95 %", "per seed", "vs SFT, points", "95 % of that", "vs SFT, %"]
    prompts = sum(language.prompts for language in reference.switching.languages)
    caption = (
        f"Share of responses with any character of the target's script. {prompts} test prompts, one sample a seed "
        f"(seeds {', '.join(map(str, config.seeds))}), {config.sampled_tokens} tokens at temperature "
        f"{config.temperature:g}, no top-k or top-p. Intervals: bootstrap over prompts, paired for differences."
    )
    return Table("Unexpected switching, sampled", columns, rows, caption)


def forced_table(experiment: Experiment) -> Table:
    """Teacher-forced hazard and perplexity of every method, and the time of a training step."""
    reference = experiment.method(SFT)
    sft = reference.metrics
    rows: list[list[Cell]] = []
    for result in (experiment.base, *experiment.methods):
        metrics, own = result.metrics, result is reference
        rows.append(
            [
                result.title,
                1000 * metrics.hz,
                None if own else f"{100 * (metrics.hz / sft.hz - 1):+.1f}",
                None if own else _per_seed(result, reference),
                round(100 * metrics.csx, 1),
                None if own else f"{100 * relative_cost(metrics, sft):+.2f}",
                metrics.ppl,
                metrics.target_ppl,
                round(1000 * sum(run.step_seconds for run in result.runs) / len(result.runs)) or None,
            ]
        )
    target = experiment.config.target
    columns = ["method", "hazard, 1e-3", "vs SFT, %", "per seed", "expected, %", "masked ppl vs SFT, %", "ppl"]
    columns += [f"{target} ppl", "step, ms"]
    caption = (
        f"On {experiment.config.evaluation_windows} test windows, mean of the seeds. Hazard: mean probability of "
        f"{target} tokens at a position; expected: share of responses expected to switch; masked ppl: perplexity with "
        "these tokens taken out."
    )
    return Table("Unexpected switching, teacher forced", columns, rows, caption)


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


def _per_seed(result: MethodResult, reference: MethodResult) -> str:
    """Relative change of the hazard, seed by seed."""
    pairs = zip(result.runs, reference.runs, strict=True)
    return ", ".join(f"{100 * (run.metrics.hz / sft.metrics.hz - 1):+.1f}" for run, sft in pairs)
