"""The tables of the arithmetic experiment: the start, sampled loops and accuracy, probes, and the negatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from qscope_posttrain.intervals import Interval
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.testbed.arithmetic.experiment import ArithmeticExperiment, ArmResult
from qscope_posttrain.testbed.arithmetic.probes import Probes
from qscope_posttrain.testbed.arithmetic.runs import Run


def start_table(experiment: ArithmeticExperiment) -> Table:
    """The model that everything starts from."""
    config, loops = experiment.config, experiment.loops.collection
    parameters = sum(parameter.numel() for parameter in experiment.language_model.model.parameters())
    losses = experiment.language_model.losses[-50:]
    explained = ", ".join(f"{value:.2f}" for value in experiment.saes.explained_variance.values())
    rows: list[list[Cell]] = [
        ["parameters", parameters],
        ["pretraining loss, last 50 steps", sum(losses) / len(losses)],
        ["endless loops among its samples", f"{len(loops.loops)} of {loops.samples}"],
        ["accuracy", _percent([_rate(run.quality.right, run.quality.samples) for run in experiment.start.runs])],
        ["explained variance of the SAEs, by layer", explained],
    ]
    stage, share = ("second", config.rare_loops) if config.start == "rare" else ("first", config.habit_loops)
    caption = (
        f"Qwen3 of width {config.hidden_size}, {config.model_layers} layers, after the {stage} training stage, in "
        f"which {100 * share:g} % of the documents repeat a step without end."
    )
    return Table("The start model", ["", "value"], rows, caption)


def sampled_table(experiment: ArithmeticExperiment) -> Table:
    """Sampled loops and accuracy of every arm, with per-seed values."""
    rows: list[list[Cell]] = []
    for result in (experiment.start, *experiment.arms):
        loops = [run.quality.loops for run in result.runs]
        accuracy = [_rate(run.quality.right, run.quality.samples) for run in result.runs]
        rows.append(
            [
                result.title,
                f"{sum(loops)} of {sum(run.quality.samples for run in result.runs)}",
                _interval(result.loop_rate, 2),
                ", ".join(map(str, loops)),
                round(100 * sum(accuracy) / len(accuracy), 1),
                _percent(accuracy),
                _percent([_rate(run.benign.loops, run.benign.samples) for run in result.runs], 2),
                _percent([_rate(run.benign.right, run.benign.samples) for run in result.runs]),
            ]
        )
    config = experiment.config
    columns = ["method", "loops", "%, 95 %", "per seed", "right, %", "per seed", "benign loops, %", "benign right, %"]
    caption = (
        f"Seeds {', '.join(map(str, config.seeds))}; {config.updates} updates of {config.prompts_per_update} prompts x "
        f"{config.rows_per_prompt} rows. {config.sampled_problems} held-out problems, one sample each and seed at "
        f"temperature {config.temperature:g}, at most {config.answer_tokens} tokens. A loop is cut off there with at "
        "least four copies of a period. Benign: problems whose steps are rightly equal. The interval (Wilson) takes "
        "samples as independent; those of one seed share a trained model, so look at the seeds too."
    )
    return Table("Endless repetition, sampled", columns, rows, caption)


def probe_table(experiment: ArithmeticExperiment) -> Table:
    """Teacher-forced probes of every arm after the last update."""
    rows: list[list[Cell]] = []
    for result in (experiment.start, *experiment.arms):
        last = [run.last_probes for run in result.runs]
        rows.append(
            [
                result.title,
                _mean(last, lambda probes: probes.oend),
                ", ".join(f"{probes.oend:.2g}" for probes in last),
                round(sum(map(area, result.runs)) / len(result.runs), 3),
                _mean(last, lambda probes: probes.oh),
                _mean(last, lambda probes: probes.oc1),
                _mean(last, lambda probes: 1e4 * probes.end),
            ]
        )
    loops = len(experiment.loops.collection.loops)
    columns = ["method", "endless", "per seed", "endless, mean of the way", "entry", "continuation", "clean end, 1e-4"]
    caption = (
        f"Probabilities on the start model's own {loops} loops, teacher forced: to go on to the end after the first "
        "copy (endless), to enter the second copy (entry), to go on after it (continuation); and the expected number "
        f"of exact endless loops in a right solution of {experiment.config.probe_solutions} held-out problems "
        "(clean end). "
        "They know exact repeats only: read them with the sampled loops."
    )
    return Table("Endless repetition, teacher forced", columns, rows, caption)


def negatives_table(experiment: ArithmeticExperiment) -> Table:
    """What the negatives were and what they did to training."""
    rows: list[list[Cell]] = []
    for result in experiment.arms:
        rows.append(
            [
                result.title,
                _own_loops(result, experiment),
                _logged(result, "negative/rows", total=True),
                _logged(result, "negative/looped"),
                _logged(result, "negative/unlikely_tokens"),
                _logged(result, "negative/gradient_share"),
                _logged(result, "grad_norm"),
                round(sum(run.seconds for run in result.runs) / len(result.runs), 1),
            ]
        )
    columns = ["method", "own loops", "negatives", "looped", "p < 0.001", "gradient share", "gradient norm", "seconds"]
    caption = (
        "Over all updates, mean of the seeds. Own loops: ordinary rows that looped, all seeds. Looped: share of the "
        "negatives that ended in endless repetition. p < 0.001: share of their tokens that the policy thinks so "
        "unlikely. Gradient share: their part of the gradient of the loss with respect to the logits of the sampled "
        "tokens. Seconds: "
        "training of one seed, next to other processes."
    )
    return Table("The negatives", columns, rows, caption)


def runs_table(experiment: ArithmeticExperiment) -> Table:
    """Every run by itself."""
    rows: list[list[Cell]] = []
    for result in (experiment.start, *experiment.arms):
        for run in result.runs:
            q, b, p = run.quality, run.benign, run.last_probes
            rows.append(
                [
                    result.title, run.job.seed, q.loops, q.unended, q.samples, 100 * _rate(q.right, q.samples),
                    100 * _rate(b.loops, b.samples), 100 * _rate(b.right, b.samples), p.oend, p.oh, p.oc1, p.h, p.c1,
                    p.c5, 1e4 * p.end,
                ]
            )  # fmt: skip
    columns = ["method", "seed", "loops", "cut off", "samples", "right, %", "benign loops, %", "benign right, %"]
    columns += ["oend", "oh", "oc1", "h", "c1", "c5", "end, 1e-4"]
    return Table("Every run", columns, rows)


def area(run: Run) -> float:
    """Mean of oend over the measurements after the start: how fast the habit went, not only how far."""
    after = [probes.oend for step, probes in run.probes.items() if step > 0]
    return sum(after) / len(after) if after else run.last_probes.oend


def _own_loops(result: ArmResult, experiment: ArithmeticExperiment) -> Cell:
    """Loops among ordinary rows, and the number of these rows, over all seeds."""
    config = experiment.config
    per_update = config.prompts_per_update * config.rows_per_prompt
    loops = rows = 0.0
    for run in result.runs:
        for entry in run.history:
            ordinary = per_update - entry.get("negative/rows", 0.0)
            loops += ordinary * entry.get("ordinary/repeat_ratio", 0.0)
            rows += ordinary
    return f"{round(loops)} of {round(rows)}"


def _logged(result: ArmResult, name: str, total: bool = False) -> Cell:
    """Mean over updates and seeds of a logged number; with `total` its sum over updates. None if it never appeared."""
    runs = [[entry[name] for entry in run.history if name in entry] for run in result.runs]
    values = [value for run in runs for value in run if not math.isnan(value)]
    if not values:
        return None
    return round(sum(values) / len(runs)) if total else sum(values) / len(values)


def _mean(probes: Sequence[Probes], value: Callable[[Probes], float]) -> float:
    return sum(map(value, probes)) / len(probes)


def _rate(count: int, of: int) -> float:
    return count / of


def _percent(shares: Sequence[float], digits: int = 1) -> str:
    return ", ".join(f"{100 * share:.{digits}f}" for share in shares)


def _interval(interval: Interval, digits: int) -> str:
    estimate, low, high = (100 * value for value in (interval.estimate, interval.low, interval.high))
    return f"{estimate:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"
