"""Tables of a repetition experiment, computed from rows alone."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.experiments.clustered import FEWEST_BASES
from benchmarks.experiments.repetition_numbers import (
    FEWER,
    POINTS,
    Comparison,
    compare,
    last_probe,
    loop_rate,
    looped_share,
    mean_gradient_norm,
    percent_text,
    ratio_text,
    right_share,
    signed_text,
    steered_otherwise,
)
from benchmarks.experiments.repetition_rows import RepetitionRow, by_arm
from benchmarks.testbed.repetition.config import PLAIN
from benchmarks.testbed.repetition.experiment import START
from qscope_posttrain.report.tables import Cell, Table

COMPARED = (
    ("default", "seeded"), ("default", "difference_of_means"), ("default", "copied_default"), ("default", "random"),
    ("default", "reward_penalty"), ("default", "paper"), ("seeded", "copied_default"), ("seeded", "reward_penalty"),
)  # fmt: skip
"""Pairs of arms that answer a question by themselves; both sides have to be among the rows."""


def loops_table(rows: Sequence[RepetitionRow], cell: str) -> Table:
    """Table of sampled loops and accuracy of every arm of one cell, against plain DAPO."""
    arms = by_arm(rows)
    lines: list[list[Cell]] = []
    for name, runs in arms.items():
        rate = loop_rate(runs)
        against = None if name == PLAIN else compare(runs, arms[PLAIN])
        lines.append(
            [
                runs[0].title,
                len(runs),
                f"{rate.loops} of {rate.samples}",
                per_run(runs),
                percent_text(rate.over_runs, 3),
                percent_text(rate.wilson, 3),
                None if against is None else ratio_text(against.ratio),
                round(100 * right_share(runs), 1),
                None if against is None else signed_text(against.accuracy),
                None if against is None or name == START else against.goal,
            ]
        )
    columns = ["method", "runs", "loops", "per run", "%, over runs", "%, Wilson", "times DAPO's", "right, %",
               "against DAPO, points", "goal"]  # fmt: skip
    caption = (
        "Loops: samples of held-out problems, one a problem, that repeat to the length limit. Per run: by seed, bases "
        f"apart. {interval_note(rows)} Times DAPO's: ratio of the pooled rates; its limits are the outer ones of a "
        "bootstrap over pairs of runs and of the exact interval of two counts, so that a count of 0 gives an upper "
        f"limit. Goal: at most {FEWER:g} times DAPO's loops for at most {POINTS:g} points, met or missed by the "
        f"intervals; else what the estimates alone say.{_otherwise(rows)}"
    )
    return Table(f"Endless loops and accuracy: {cell}", columns, lines, caption)


def effects_table(rows: Sequence[RepetitionRow], cell: str) -> Table:
    """Table of the other effects of the arms of one cell: benign repetition, probes, the negatives, gradients, time."""
    arms = by_arm(rows)
    lines: list[list[Cell]] = []
    for name, runs in arms.items():
        benign = loop_rate(runs, "benign")
        against = None if name == PLAIN else compare(runs, arms[PLAIN])
        lines.append(
            [
                runs[0].title,
                f"{benign.loops} of {benign.samples}",
                percent_text(benign.shown, 2),
                None if against is None else ratio_text(against.benign_ratio),
                round(100 * right_share(runs, "benign"), 1),
                None if against is None else signed_text(against.benign_accuracy),
                percent_text(looped_share(runs)),
                mean_gradient_norm(runs),
                percent_text(last_probe(runs, "oend")),
                percent_text(last_probe(runs, "oh")),
                percent_text(last_probe(runs, "oc1")),
                None if name == START else round(sum(row.seconds for row in runs) / len(runs), 1),
            ]
        )
    columns = ["method", "benign loops", "%", "times DAPO's", "benign right, %", "against DAPO, points",
               "negatives that loop, %", "gradient norm", "endless, %", "entry, %", "continuation, %",
               "seconds"]  # fmt: skip
    caption = (
        "Benign: problems whose steps are rightly equal; limits: the outer ones over runs and of Wilson's. Endless, "
        "entry, continuation: teacher-forced probabilities after the last update, on the start model's own loops, of "
        "going on to the end after the first copy, of the second copy, and of the third; they know exact repeats only. "
        "Gradient norm: before clipping, mean over updates. Seconds: training of one run, next to other processes. "
        f"{interval_note(rows)}"
    )
    return Table(f"What else changed: {cell}", columns, lines, caption)


def comparison_table(rows: Sequence[RepetitionRow], cell: str) -> Table:
    """Table of arms of one cell against each other, run by run."""
    arms = by_arm(rows)
    lines: list[list[Cell]] = []
    for first, second in COMPARED:
        if first not in arms or second not in arms:
            continue
        found = compare(arms[first], arms[second])
        if found is None:
            continue
        lines.append(
            [
                f"{arms[first][0].title} against {arms[second][0].title}",
                found.pairs,
                "{} against {}".format(*found.loops),
                ratio_text(found.ratio),
                signed_text(found.loop_difference),
                signed_text(found.accuracy),
                ratio_text(found.benign_ratio),
                signed_text(found.benign_accuracy),
                answer(found),
            ]
        )
    columns = ["methods", "pairs", "loops", "ratio", "difference in 10,000", "accuracy, points", "benign loops, ratio",
               "benign accuracy, points", "shown"]  # fmt: skip
    caption = (
        "The first against the second, over pairs of runs of one start and seed, as in the table of loops. Shown: what "
        f"the intervals of the ratio and of the accuracy allow to say. {interval_note(rows)}"
    )
    return Table(f"Methods against each other: {cell}", columns, lines, caption)


def runs_table(rows: Sequence[RepetitionRow], cell: str) -> Table:
    """Table of every run of one cell."""
    lines: list[list[Cell]] = []
    for runs in by_arm(rows).values():
        for row in runs:
            q, b, p = row.quality, row.benign, row.last_probes
            lines.append(
                [
                    row.title, row.base, row.seed, q.loops, q.unended, q.samples, round(100 * q.right / q.samples, 2),
                    b.loops, b.samples, round(100 * b.right / b.samples, 2), row.negatives, row.looped, p.oend, p.oh,
                    p.oc1, 1e4 * p.end, row.gradient_norm, round(row.seconds, 1),
                ]
            )  # fmt: skip
    columns = ["method", "base", "seed", "loops", "cut off", "samples", "right, %", "benign loops", "benign samples",
               "benign right, %", "negatives", "looped", "oend", "oh", "oc1", "end, 1e-4", "gradient norm",
               "seconds"]  # fmt: skip
    return Table(f"Every run: {cell}", columns, lines)


def answer(found: Comparison) -> str:
    """Name the differences that the intervals of a comparison show."""
    said = []
    if found.ratio.high < 1:
        said.append("fewer loops")
    elif found.ratio.low > 1:
        said.append("more loops")
    if found.accuracy.excludes_zero:
        said.append("more right" if found.accuracy.estimate > 0 else "fewer right")
    return " and ".join(said) or "no difference shown"


def per_run(rows: Sequence[RepetitionRow]) -> str:
    """Loops of every run by seed, with a bar between bases."""
    grouped: dict[int, list[str]] = {}
    for row in rows:
        grouped.setdefault(row.base, []).append(str(row.quality.loops))
    return " | ".join(" ".join(loops) for loops in grouped.values())


def interval_note(rows: Sequence[RepetitionRow]) -> str:
    """Name the unit that the intervals take as independent."""
    bases = len({row.base for row in rows})
    if bases >= FEWEST_BASES:
        return f"Intervals (95 %) are over {bases} start checkpoints; Wilson's take samples as independent."
    few = "a single start checkpoint" if bases == 1 else f"{bases} start checkpoints"
    return (
        f"Intervals (95 %) are over runs, as there are no more than {few}: they leave out how starts differ. Wilson's "
        "take samples as independent."
    )


def _otherwise(rows: Sequence[RepetitionRow]) -> str:
    found = steered_otherwise(by_arm(rows))
    return "".join(
        f" {title}: its own way of steering made nothing loop in base {', '.join(map(str, bases))}, where it was "
        "steered as the default is."
        for title, bases in found.items()
    )
