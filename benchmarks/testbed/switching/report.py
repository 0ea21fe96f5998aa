"""The switching task's part of the demo: its tables, its sections of the report, and its files."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.testbed.models import save_model
from benchmarks.testbed.plots import Mark, scatter_with_intervals
from benchmarks.testbed.report import DemoPart, Example, bars, headline_row, write_lines
from benchmarks.testbed.switching.config import ARMS, SFT, SwitchingConfig
from benchmarks.testbed.switching.experiment import Experiment, MethodResult, relative_cost, run_experiment
from benchmarks.testbed.switching.windows import decode
from qscope_posttrain.features.explain.contexts import token_view
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.intervals import Interval, bootstrap_difference
from qscope_posttrain.report.html import Figure, Section
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.text.scripts import target_script

EXAMPLES = "examples.jsonl"
_SHOWN = 8
_SEED = 5
_TEXTS_SEED, _SFT_SEED, _PROMPTS_SEED = 41, 42, 43


def run_switching(config: SwitchingConfig, folder: Path) -> DemoPart:
    """Run the chain, and write examples and artefacts into `folder`."""
    experiment = run_experiment(config)
    results = (experiment.base, *experiment.methods)
    features = experiment.world.feature_sets.load("sae")
    tables = {
        "model": model_table(experiment),
        "features": firing_table(features, config.tapped_layers[-1]),
        "causal_check": experiment.world.feature_sets.causal_table(),
        **({} if experiment.tuning is None else {"tuning": experiment.tuning}),
        "sampled": sampled_table(experiment),
        "teacher_forced": forced_table(experiment),
    }
    examples = write_lines(
        folder / EXAMPLES,
        (
            {
                "method": result.name,
                "seed": config.seeds[sample.sample_index],
                "language": sample.language,
                "prompt_index": sample.prompt_index,
                "prompt": sample.prompt,
                "response": sample.response,
                "switched": switched,
            }
            for result in results
            for sample, switched in zip(result.switching.samples, result.switching.switched, strict=True)
        ),
    )
    headline, note = _headline(experiment)
    return DemoPart(
        name="switching",
        headline=headline,
        note=note,
        sections=_sections(experiment, features, tables),
        tables=tables,
        results={
            "methods": {result.name: _numbers(result) for result in results},
            "explained_variance": experiment.world.dictionaries.explained_variance,
            "examples": examples,
        },
        artefacts=export(experiment, folder),
        seeds=tuple(config.seeds),
    )


def model_table(experiment: Experiment) -> Table:
    """Table of the sizes and the fit of the language model and its SAEs."""
    world, metrics = experiment.world, experiment.base.metrics
    parameters = sum(parameter.numel() for parameter in world.language_model.model.parameters())
    tokens = {language: len(text.tokens) for language, text in world.language_model.maker.encoded["pre"].items()}
    rows: list[list[Cell]] = [
        ["parameters of the language model", f"{parameters:,}"],
        ["pretraining tokens in the corpus", ", ".join(f"{name} {count:,}" for name, count in tokens.items())],
        ["perplexity of responses, other languages / target", f"{metrics.ppl:.2f} / {metrics.target_ppl:.2f}"],
        ["responses that switch, before SFT", f"{100 * experiment.base.switching.ratio:.1f} %"],
    ]
    for layer, share in world.dictionaries.explained_variance.items():
        latents = world.dictionaries.saes[layer].d_sae
        rows.append([f"SAE of layer {layer}: {latents} latents, explained variance", f"{share:.3f}"])
    return Table("Language model and SAEs", ["", "measured"], rows)


def firing_table(features: FeatureSet, layer: int, per_language: int = 3) -> Table:
    """Table of the top features per language in one layer, and how often they fire in every language."""
    rows: list[list[Cell]] = []
    for language in features.languages:
        chosen = features.select(language=language, layers=[layer], top=per_language).layers[layer]
        for index, name in enumerate(chosen.names):
            rates = [float(rate) for rate in chosen.firing_rate[:, index]]
            rows.append([name, float(chosen.scores[index]), *rates, float(chosen.effects[index])])
    columns = ["feature", "monolinguality", *(f"fires on {language}" for language in features.languages), "effect"]
    caption = (
        "Share of tokens on which a feature is active. Effect: change of the target's mean log-probability per unit of "
        "the feature's direction (target features only)."
    )
    return Table(f"Top features per language, layer {layer}", columns, rows, caption)


def sampled_table(experiment: Experiment) -> Table:
    """Table of sampled switching of every method, and its difference from SFT on the same prompts."""
    reference, config = experiment.method(SFT), experiment.config
    rows: list[list[Cell]] = []
    for result in (experiment.base, *experiment.methods):
        micro, change = result.switching.micro, _difference(result, reference)
        against: list[Cell] = [
            f"{100 * change.estimate:+.1f}",
            f"{100 * change.low:+.1f} .. {100 * change.high:+.1f}",
            f"{100 * change.estimate / max(reference.switching.ratio, 1e-9):+.0f}",
        ]
        rows.append(
            [
                result.title,
                result.weight or None,
                round(100 * micro.estimate, 1),
                f"{100 * micro.low:.1f} .. {100 * micro.high:.1f}",
                ", ".join(f"{100 * ratio:.1f}" for ratio in result.ratio_per_seed),
                *([None] * 3 if result is reference else against),
            ]
        )
    columns = ["method", "weight", "switched, %", "95 %", "per seed", "vs SFT, points", "95 % of that", "vs SFT, %"]
    prompts = sum(language.prompts for language in reference.switching.languages)
    caption = (
        f"Share of responses with any character of the target's script. {prompts} test prompts, one sample per seed "
        f"(seeds {', '.join(map(str, config.seeds))}), {config.sampled_tokens} tokens at temperature "
        f"{config.temperature:g}, no top-k or top-p. Intervals: bootstrap over prompts, paired for differences."
    )
    return Table("Unexpected switching, sampled", columns, rows, caption)


def forced_table(experiment: Experiment) -> Table:
    """Table of teacher-forced hazard and perplexity of every method, and the time of a training step."""
    reference = experiment.method(SFT)
    sft, target = reference.metrics, experiment.config.target
    rows: list[list[Cell]] = []
    for result in (experiment.base, *experiment.methods):
        metrics = result.metrics
        per_seed = [
            f"{100 * (run.metrics.hz / plain.metrics.hz - 1):+.1f}"
            for run, plain in zip(result.runs, reference.runs, strict=True)
        ]
        against = [f"{100 * (metrics.hz / sft.hz - 1):+.1f}", ", ".join(per_seed)]
        own = result is reference
        rows.append(
            [
                result.title,
                1000 * metrics.hz,
                *([None, None] if own else against),
                round(100 * metrics.csx, 1),
                None if own else f"{100 * relative_cost(metrics, sft):+.2f}",
                metrics.ppl,
                metrics.target_ppl,
                round(1000 * sum(run.step_seconds for run in result.runs) / len(result.runs)) or None,
            ]
        )
    columns = ["method", "hazard, 1e-3", "vs SFT, %", "per seed", "expected, %", "masked ppl vs SFT, %", "ppl"]
    columns += [f"{target} ppl", "step, ms"]
    caption = (
        f"On {experiment.config.evaluation_windows} test windows, mean of the seeds. Hazard: mean probability of "
        f"{target} tokens at a position; expected: share of responses expected to switch; masked ppl: perplexity with "
        "these tokens taken out."
    )
    return Table("Unexpected switching, teacher forced", columns, rows, caption)


def _difference(result: MethodResult, reference: MethodResult) -> Interval:
    """The difference in sampled switching, paired: all methods answer the same prompts."""
    return bootstrap_difference(result.switching.outcomes, reference.switching.outcomes)


def _headline(experiment: Experiment) -> tuple[list[list[Cell]], str]:
    """Lines of the summary table and their part of its caption."""
    reference, target = experiment.method(SFT), experiment.config.target
    name = {"zh": "Chinese"}.get(target, target)
    rows = []
    for result in experiment.methods:
        change = None if result is reference else _difference(result, reference)
        cost = 100 * relative_cost(result.metrics, reference.metrics)
        quality = f"perplexity {result.metrics.masked_ppl:.0f}" + ("" if change is None else f" ({cost:+.1f} %)")
        title = {SFT: "SFT (plain)", "random_features": "random features (control)"}.get(result.name, result.title)
        habit = f"switches to {name} unasked"
        rows.append(headline_row(habit, title, result.switching.micro, change, reference.title, quality, digits=0))
    note = (
        f"Switching: {len(reference.switching.samples)} sampled answers per line to prompts in other languages; before "
        f"SFT {100 * experiment.base.switching.ratio:.0f} % turned into {name}. SASFT penalizes SAE features of "
        f"{name}, the token penalty its tokens; the control penalizes random SAE features and should not help. "
        "Perplexity on ordinary text: less is better."
    )
    return rows, note


def _sections(experiment: Experiment, features: FeatureSet, tables: Mapping[str, Table]) -> list[Section]:
    config, language_model = experiment.config, experiment.world.language_model
    layer = config.tapped_layers[-1]
    top = features.select(language=config.target, layers=[layer], top=min(config.top, 2))
    texts = [own[0] for own in language_model.texts("val", len(language_model.languages), _SEED).values()]
    saes = experiment.world.dictionaries.saes
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
            shaded=token_view(language_model.model, language_model.tokenizer, texts, top, saes),
            sections=[Section("Are the features causal?", tables=[tables["causal_check"]])],
        ),
        Section("The model", tables=[table for name in ("model", "tuning") if (table := tables.get(name)) is not None]),
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
        f"turn into {config.target} at a random character. Each method then fine-tunes it on {config.sft_windows} "
        f"{'contaminated' if config.sft_switch else 'clean'} windows with the same data, order and optimizer. Weights "
        f"are {where}; the numbers are from test prompts.",
        "",
        *(f"- **{ARMS[result.name].title}**: {ARMS[result.name].description}" for result in experiment.methods),
        "",
        "Read switching together with perplexity: a damaged model switches more. Random features show what penalizing "
        "anything does; difference of means and token penalty show what can be had without an SAE.",
    ]
    return "\n".join(lines)


def _switching_plot(experiment: Experiment) -> Figure:
    results = (experiment.base, *experiment.methods)
    return bars(
        [(result.title, result.switching.micro, result.ratio_per_seed) for result in results],
        "responses that switch",
        experiment.method(SFT).title,
        "Share of sampled responses with any character of the target's script; 95 % bootstrap intervals over prompts, "
        "dots: seeds.",
    )


def _trade_off_plot(experiment: Experiment) -> Figure:
    reference, marks = experiment.method(SFT), []
    for result in experiment.methods:
        pairs = list(zip(result.runs, reference.runs, strict=True))
        costs = [relative_cost(run.metrics, sft.metrics) for run, sft in pairs]
        changes = [run.metrics.hz / sft.metrics.hz - 1 for run, sft in pairs]
        ranges = [(min(values), max(values)) if len(pairs) > 1 else None for values in (costs, changes)]
        marks.append(Mark(result.title, sum(costs) / len(costs), sum(changes) / len(changes), *ranges))
    svg = scatter_with_intervals(
        marks, "masked perplexity against SFT", "hazard of switching against SFT", x_percent=True, y_percent=True
    )
    return Figure(svg, "What a method gains (down) and what it costs (right); lines: range over seeds.")


def _examples_section(experiment: Experiment) -> Section:
    """Show the same random prompts before SFT, after SFT, and after each penalty."""
    shown = [experiment.base, *experiment.methods]
    first = [[s for s in result.switching.samples if s.sample_index == 0] for result in shown]
    chosen = random.Random(_SEED).sample(range(len(first[0])), min(_SHOWN, len(first[0])))
    config = experiment.config
    script = target_script(config.target) if config.identify == "script" else ""
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


def _numbers(result: MethodResult) -> dict[str, Any]:
    """JSON-ready numbers of one method."""
    runs = [
        {
            "seed": run.job.seed,
            "switched": ratio,
            "metrics": asdict(run.metrics),
            "seconds": run.seconds,
            "step_seconds": run.step_seconds,
            "history": run.history,
        }
        for run, ratio in zip(result.runs, result.ratio_per_seed, strict=True)
    ]
    return {
        "title": result.title,
        "weight": result.weight,
        "switching": result.switching.to_dict(),
        "metrics": asdict(result.metrics),
        "runs": runs,
    }


def export(experiment: Experiment, folder: Path) -> dict[str, Path]:
    """Write everything that `qscope features find`, `qscope sft` and `qscope evaluate` need; return the places.

    `model/` (with tokenizer), `sae/layer{n}.sae.pt`, `features.safetensors`, `texts/<language>.txt` (windows of the
    sft split, one per line), `sft.jsonl` (prompt, completion, language), `prompts.jsonl` (prompt, language; test
    split). Prompts and completions begin at character boundaries and end at the last whole character.
    """
    world, config = experiment.world, experiment.config
    model, maker = world.language_model, world.language_model.maker
    names = ("model", "sae", "features.safetensors", "texts", "sft.jsonl", "prompts.jsonl")
    places = {name.partition(".")[0]: folder / name for name in names}
    save_model(model.model, model.tokenizer, places["model"])
    for name in ("sae", "texts"):
        places[name].mkdir(parents=True, exist_ok=True)
    for layer in config.tapped_layers:
        shutil.copyfile(world.dictionaries.folder / f"layer{layer}.sae.pt", places["sae"] / f"layer{layer}.sae.pt")
    shutil.copyfile(world.feature_sets.folder / "sae.safetensors", places["features"])
    for language, texts in model.texts("sft", config.feature_windows, _TEXTS_SEED).items():
        lines = [" ".join(text.split()) for text in texts]
        (places["texts"] / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def text(tokens: list[int]) -> str:
        return decode(model.tokenizer, tokens).replace("\N{REPLACEMENT CHARACTER}", "")  # halves of characters

    windows = maker.dialogue("sft", config.sft_windows, _SFT_SEED, config.sft_switch)
    rows, cut = zip(windows.languages, windows.input_ids.tolist(), strict=True), windows.prompt_length
    sft = ({"prompt": text(row[:cut]), "completion": text(row[cut:]), "language": name} for name, row in rows)
    write_lines(places["sft"], sft)
    windows = maker.dialogue("test", config.sampled_prompts, _PROMPTS_SEED, languages=model.sources)
    prompts = zip(windows.languages, windows.prompts.tolist(), strict=True)
    write_lines(places["prompts"], ({"prompt": text(row), "language": name} for name, row in prompts))
    return places
