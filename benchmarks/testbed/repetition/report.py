"""The repetition task's part of the demo: its tables, its sections of the report, and its files."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.testbed.models import save_model
from benchmarks.testbed.repetition.config import ARMS, PLAIN, RepetitionConfig
from benchmarks.testbed.repetition.experiment import ArmResult, Experiment, run_experiment
from benchmarks.testbed.repetition.features import TO_END, WINDOW
from benchmarks.testbed.repetition.task import decode_words, draw_problems
from benchmarks.testbed.report import DemoPart, Example, bars, headline_row, write_lines
from qscope_posttrain.features.steering import SETTINGS_KEY
from qscope_posttrain.intervals import rate_difference
from qscope_posttrain.report.html import Figure, Section
from qscope_posttrain.report.plots import Curve, line_curves
from qscope_posttrain.report.tables import Cell, Table

_EXAMPLES = 4
_SEED = 5
_TRAINING_SEED, _PROMPTS_SEED = 51, 52
_PROMPTS = 1000


def run_repetition(config: RepetitionConfig, folder: Path) -> DemoPart:
    """Run the chain, and write model, SAEs, features and data into `folder`."""
    experiment = run_experiment(config)
    features = experiment.world.features
    chosen = features.load()
    curve_names = {WINDOW: "steering_curve", TO_END: "steering_curve_to_end"}
    steering = {
        curve_names[way]: features.tables(way)["steering_curve"] for way in curve_names if features.path(way).exists()
    }
    tables = {
        "repetition_start": start_table(experiment),
        "repetition_features": chosen.to_table(),
        "repetition_sampled": sampled_table(experiment),
        "negatives": negatives_table(experiment),
        **steering,
    }
    results = {
        "repetition_arms": {result.name: _numbers(result) for result in (experiment.start, *experiment.arms)},
        "steering": chosen.settings.get(SETTINGS_KEY),
    }
    headline, note = _headline(experiment)
    return DemoPart(
        name="repetition",
        headline=headline,
        note=note,
        sections=_sections(experiment, tables, list(steering)),
        tables=tables,
        results=results,
        artefacts={f"arithmetic_{name}": place for name, place in export(experiment, folder).items()},
        seeds=tuple(config.seeds),
    )


def start_table(experiment: Experiment) -> Table:
    """Table of the model from which all training starts."""
    config, world = experiment.config, experiment.world
    losses = world.language_model.losses[-50:]
    loops = world.loops.collection
    rows: list[list[Cell]] = [
        ["parameters", sum(parameter.numel() for parameter in world.language_model.model.parameters())],
        ["pretraining loss, last 50 steps", sum(losses) / len(losses)],
        ["endless loops among its samples", f"{len(loops.loops)} of {loops.samples}"],
        ["accuracy, %", ", ".join(_percent(run.quality.right, run.quality.samples) for run in experiment.start.runs)],
        ["explained variance of the SAEs, by layer",
         ", ".join(f"{value:.2f}" for value in world.saes.explained_variance.values())],
    ]  # fmt: skip
    stage, share = ("second", config.rare_loops) if config.start == "rare" else ("first", config.habit_loops)
    caption = (
        f"Qwen3 of width {config.hidden_size}, {config.model_layers} layers, after the {stage} training stage, in "
        f"which {100 * share:g} % of the documents repeat a step without end."
    )
    return Table("The start model", ["", "value"], rows, caption)


def sampled_table(experiment: Experiment) -> Table:
    """Sampled loops and accuracy of every arm, with per-seed values."""
    rows: list[list[Cell]] = []
    for result in (experiment.start, *experiment.arms):
        qualities, benign = [run.quality for run in result.runs], [run.benign for run in result.runs]
        rate = result.loop_rate
        rows.append(
            [
                result.title,
                f"{sum(q.loops for q in qualities)} of {sum(q.samples for q in qualities)}",
                f"{100 * rate.estimate:.2f} ({100 * rate.low:.2f} .. {100 * rate.high:.2f})",
                ", ".join(str(q.loops) for q in qualities),
                round(100 * result.accuracy.estimate, 1),
                ", ".join(_percent(q.right, q.samples) for q in qualities),
                ", ".join(_percent(q.loops, q.samples, 2) for q in benign),
                ", ".join(_percent(q.right, q.samples) for q in benign),
            ]
        )
    config = experiment.config
    columns = ["method", "loops", "%, 95 %", "per seed", "right, %", "per seed", "benign loops, %", "benign right, %"]
    caption = (
        f"Seeds {', '.join(map(str, config.seeds))}; {config.updates} updates of {config.prompts_per_update} prompts x "
        f"{config.rows_per_prompt} rows. {config.sampled_problems} held-out problems, one sample each per seed at "
        f"temperature {config.temperature:g}, at most {config.answer_tokens} tokens. A loop is cut off there with at "
        "least four copies of a period. Benign: problems whose steps are rightly equal. The interval (Wilson) takes "
        "samples as independent; those of one seed share a trained model, so look at the seeds too."
    )
    return Table("Endless repetition, sampled", columns, rows, caption)


def negatives_table(experiment: Experiment) -> Table:
    """Table of the negatives of every arm and their effect on training."""
    names = ("negative/looped", "negative/unlikely_tokens", "negative/gradient_share", "grad_norm")
    rows: list[list[Cell]] = []
    for result in experiment.arms:
        rows.append(
            [
                result.title,
                _own_loops(result, experiment.config),
                round(_logged(result, "negative/rows", total=True) or 0),
                *(_logged(result, name) for name in names),
                round(sum(run.seconds for run in result.runs) / len(result.runs), 1),
            ]
        )
    columns = ["method", "own loops", "negatives", "looped", "p < 0.001", "gradient share", "gradient norm", "seconds"]
    caption = (
        "Over all updates, mean of the seeds. Own loops: ordinary rows that looped, all seeds. Looped: share of the "
        "negatives that ended in endless repetition. p < 0.001: share of their tokens that the policy thinks so "
        "unlikely. Gradient share: their part of the gradient of the loss with respect to the logits of the sampled "
        "tokens. Seconds: training of one seed, beside other processes."
    )
    return Table("The negatives", columns, rows, caption)


def _own_loops(result: ArmResult, config: RepetitionConfig) -> Cell:
    """Loops among ordinary rows, and the number of these rows, over all seeds."""
    loops = rows = 0.0
    for entry in (entry for run in result.runs for entry in run.history):
        ordinary = config.prompts_per_update * config.rows_per_prompt - entry.get("negative/rows", 0.0)
        loops += ordinary * entry.get("ordinary/repeat_ratio", 0.0)
        rows += ordinary
    return f"{round(loops)} of {round(rows)}"


def _logged(result: ArmResult, name: str, total: bool = False) -> float | None:
    """Mean of a logged number over updates and seeds, with `total` the sum over updates; None if it never appeared."""
    values = [entry[name] for run in result.runs for entry in run.history if not math.isnan(entry.get(name, math.nan))]
    return sum(values) / (len(result.runs) if total else len(values)) if values else None


def _percent(count: int, of: int, digits: int = 1) -> str:
    return f"{100 * count / of:.{digits}f}"


def _headline(experiment: Experiment) -> tuple[list[list[Cell]], str]:
    """Lines of the summary table and their part of its caption."""
    plain, rows = experiment.arm(PLAIN), []
    counts = {
        result.name: (sum(run.quality.loops for run in result.runs), sum(run.quality.samples for run in result.runs))
        for result in (experiment.start, *experiment.arms)
    }
    titles = {
        PLAIN: "DAPO (plain)",
        "default": "DAPO, steered negatives",
        "seeded": "DAPO, seeded negatives",
        "random": "DAPO, random steering (control)",
    }
    for result in experiment.arms:
        change = None if result is plain else rate_difference(counts[result.name], counts[PLAIN])
        quality = f"{100 * result.accuracy.estimate:.1f} % right answers"
        title = titles.get(result.name, result.title)
        rows.append(
            headline_row("repeats itself endlessly", title, result.loop_rate, change, "DAPO", quality, digits=2)
        )
    loops, samples = counts[experiment.start.name]
    note = (
        f"Repetition: {samples} sampled solutions of sums per line; before DAPO {_percent(loops, samples, 2)} % "
        "repeated a step without end. Negatives are extra answers that are made to loop, and then punished: steered "
        "along SAE features of repetition, or seeded with two copies of a piece of text."
    )
    return rows, note


def _sections(experiment: Experiment, tables: Mapping[str, Table], steering: list[str]) -> list[Section]:
    results, reference = (experiment.start, *experiment.arms), experiment.arm(PLAIN).title
    return [
        Section(
            "Endless repetition by method",
            _methods_text(experiment),
            tables=[tables["repetition_sampled"]],
            figures=[
                bars(
                    [(r.title, r.loop_rate, [q.loops / q.samples for q in _qualities(r)]) for r in results],
                    "samples that repeat without end",
                    reference,
                    "Share of sampled completions that repeat to the length limit; 95 % Wilson intervals over all "
                    "samples, dots: seeds.",
                ),
                bars(
                    [(r.title, r.accuracy, [q.right / q.samples for q in _qualities(r)]) for r in results],
                    "right answers",
                    reference,
                    "Share of right answers in the same samples: what the method costs.",
                ),
            ],
            sections=[
                Section(
                    "The negatives",
                    tables=[tables["negatives"]],
                    figures=[_looped_plot(experiment)],
                ),
                Section("Repetition features", tables=[tables[name] for name in ("repetition_features", *steering)]),
                Section(
                    "Loops of the start model",
                    "Completions that it wrote by itself, drawn at random among those that repeat to the limit.",
                    tables=[tables["repetition_start"]],
                    examples=_examples(experiment),
                ),
            ],
        )
    ]


def _looped_plot(experiment: Experiment, block: int = 5) -> Figure:
    """Share of the negatives that loop, averaged over seeds and blocks of updates."""
    curves = []
    for result in experiment.arms:
        series = [[entry.get("negative/looped", 0.0) for entry in run.history] for run in result.runs]
        means = [sum(values) / len(values) for values in zip(*series, strict=True)]
        blocks = [means[start : start + block] for start in range(0, len(means), block)]
        steps = [min((index + 1) * block, len(means)) for index in range(len(blocks))]
        if result.name != PLAIN:
            curves.append(Curve(result.title, steps, [sum(values) / len(values) for values in blocks]))
    caption = (
        "Share of the negatives that end in endless repetition, mean over seeds and five updates: it falls as the "
        "policy unlearns what provokes it."
    )
    return Figure(line_curves(curves, "update", "negatives that loop", percent=True), caption)


def _qualities(result: ArmResult) -> list[Any]:
    return [run.quality for run in result.runs]


def _methods_text(experiment: Experiment) -> str:
    config, loops = experiment.config, experiment.world.loops.collection
    lines = [
        "A small model that solves sums step by step was pretrained on documents some of which repeat a step without "
        f"end: {len(loops.loops)} of {loops.samples} of its samples do so too. Each method then trains it for "
        f"{config.updates} updates of {config.prompts_per_update} prompts x {config.rows_per_prompt} rows with the "
        "same prompts, reward (1 for the right answer, DAPO's soft overlong punishment) and optimizer. Loops are so "
        "rare that ordinary sampling hardly ever finds one.",
        "",
        *(f"- **{ARMS[result.name].title}**: {ARMS[result.name].description}" for result in experiment.arms),
        "",
        "Read loops together with accuracy: both are sampled on held-out problems.",
    ]
    return "\n".join(lines)


def _examples(experiment: Experiment) -> list[Example]:
    tokenizer, loops = experiment.world.language_model.tokenizer, experiment.world.loops.collection.loops
    chosen = random.Random(_SEED).sample(range(len(loops)), min(_EXAMPLES, len(loops)))
    return [
        Example(
            " ".join(decode_words(tokenizer, loops[index].prompt_ids)),
            {"start model": " ".join(decode_words(tokenizer, loops[index].completion_ids))},
            "",
        )
        for index in sorted(chosen)
    ]


def _numbers(result: ArmResult) -> dict[str, Any]:
    """JSON-ready numbers of one arm."""
    runs = [
        {
            "seed": run.job.seed,
            "quality": asdict(run.quality),
            "benign": asdict(run.benign),
            "history": run.history,
            "seconds": run.seconds,
        }
        for run in result.runs
    ]
    return {"title": result.title, "loop_rate": result.loop_rate, "accuracy": result.accuracy, "runs": runs}


def export(experiment: Experiment, folder: Path) -> dict[str, Path]:
    """Write everything that `qscope grpo`, `qscope steer` and `qscope evaluate repetition` need; return the places.

    `model/` (with tokenizer), `sae/layer{n}.sae.pt`, `features.safetensors` (with the steering that was chosen),
    `rl.jsonl` (prompt, answer; problems that training may show), `prompts.jsonl` (the same, held out).
    """
    config, world = experiment.config, experiment.world
    names = ("model", "sae", "features.safetensors", "rl.jsonl", "prompts.jsonl")
    places = {name.partition(".")[0]: folder / name for name in names}
    places["sae"].mkdir(parents=True, exist_ok=True)
    save_model(world.language_model.model, world.language_model.tokenizer, places["model"])
    for file in sorted(world.saes.folder.glob("layer*")):
        shutil.copyfile(file, places["sae"] / file.name)
    shutil.copyfile(world.features.path(), places["features"])
    drawn = {
        "rl": draw_problems(config.updates * config.prompts_per_update, config.operations, _TRAINING_SEED, False),
        "prompts": draw_problems(_PROMPTS, config.operations, _PROMPTS_SEED, held_out=True),
    }
    for name, problems in drawn.items():
        write_lines(places[name], ({"prompt": problem.prompt, "answer": problem.answer} for problem in problems))
    return places
