"""Tables of a switching experiment, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from benchmarks.experiments.cell_results import ArmAtWeight, CellResult
from benchmarks.experiments.clustered import FEWEST_BASES, ClusteredInterval
from benchmarks.experiments.switching_rows import Measure
from qscope_posttrain.intervals import Interval
from qscope_posttrain.report.tables import Cell, Table

GOAL_REDUCTION = 50.0
"""Least reduction of sampled switching against SFT, per cent."""
GOAL_COST = 1.0
"""Largest rise of (masked) perplexity, per cent."""
Outcome = Literal["better", "worse", "no difference shown"]
_SWITCHING: tuple[Measure, ...] = ("hazard", "expected", "sampled")


def outcome_of(difference: ClusteredInterval) -> Outcome:
    """Name the outcome of an effect minus a control's; less switching is better."""
    if not difference.excludes_zero:
        return "no difference shown"
    return "better" if difference.estimate < 0 else "worse"


def meets_goal(arm: ArmAtWeight) -> bool:
    """Whether an arm halves SFT's sampled switching, with the whole interval of the change below 0, within the cost."""
    change, cost = arm.sampled_change, arm.cost
    if arm.choice is None or change is None or cost is None:
        return False
    return change.estimate <= -GOAL_REDUCTION and change.high < 0 and cost.estimate <= GOAL_COST


def show(interval: ClusteredInterval | Interval | None, unit: str = "") -> str:
    """A change with its interval, such as "-41.2 % (-45.0 .. -37.1)"; without an interval where there is none."""
    if interval is None:
        return "-"
    text = f"{_signed(interval.estimate)}{unit}"
    return text if math.isnan(interval.low) else f"{text} ({_signed(interval.low)} .. {_signed(interval.high)})"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # + 0.0: no "-0.0"


def cell_tables(result: CellResult, title: str = "") -> dict[str, Table]:
    """All tables of one cell: "chosen", "equal_cost_<budget>", "pairs", "languages" where there are several, "runs".

    Args:
        result: its numbers.
        title: put before the title of every table; the cell's name by default.
    """
    tables = {"chosen": chosen_table(result)}
    for budget in result.budgets:
        tables[f"equal_cost_{budget:g}"] = equal_cost_table(result, budget)
    if result.sae_arms and result.controls:
        tables["pairs"] = pairs_table(result, max(result.budgets))
    if max((len(arm.languages) for arm in result.chosen), default=0) > 1:
        tables["languages"] = languages_table(result)
    tables["runs"] = runs_table(result)
    head = title or result.cell
    return {
        name: Table(f"{head}: {table.title}", table.columns, table.rows, table.caption)
        for name, table in tables.items()
    }


def verdict_table(results: Sequence[CellResult], titles: Mapping[str, str] | None = None) -> Table:
    """Table with one line per cell: the best SAE arm against the best control, and who met the goal."""
    rows: list[list[Cell]] = []
    for result in results:
        at = result.budgets[max(result.budgets)]
        arms, best, control = at.arms["hazard"], at.best_sae, at.best_control
        difference = at.difference("hazard", best, control) if best is not None and control is not None else None
        rows.append(
            [
                (titles or {}).get(result.cell, result.cell),
                None if best is None else f"{result.titles[best]} {show(arms[best].effect)}",
                None if control is None else f"{result.titles[control]} {show(arms[control].effect)}",
                show(difference),
                None if difference is None else outcome_of(difference),
                ", ".join(arm.title for arm in result.chosen if meets_goal(arm)) or "none",
            ]
        )
    columns = ["cell", "best SAE arm, %", "best control, %", "difference", "the SAE arm is", "goal met by"]
    caption = (
        "At the largest budget of perplexity. Change of the hazard against SFT in per cent, with 95 % intervals, and "
        "their paired difference in points; below 0 the SAE arm switches less. Arms were picked by the hazard on "
        "validation prompts; the differences are not corrected for the number of cells. Goal: at least 50 % less "
        "sampled switching by the estimate, and less by the whole interval, at 1 % perplexity or less."
    )
    return Table("Verdicts", columns, rows, caption)


def chosen_table(result: CellResult) -> Table:
    """Table of every arm at the weight chosen on validation prompts, measured on test prompts."""
    by_script = result.identify == "script"
    rows: list[list[Cell]] = []
    for arm in result.chosen:
        row: list[Cell] = [_titled(arm), None if arm.choice is None else arm.choice.weight, _share(arm.switched)]
        row += [_share(arm.any)] if by_script else []
        row += [
            show(arm.sampled_change),
            show(arm.hazard_change),
            arm.expected,
            _cost(arm),
            None if arm.target_cost is None else f"{arm.target_cost.estimate:+.1f}",
            None if arm.endless is None else round(arm.endless.estimate, 2),
            arm.runs,
        ]
        rows.append(row)
    columns = ["arm", "weight", "switched, %", *(["any script, %"] if by_script else []), "against SFT, %"]
    columns += ["hazard, %", "expected, %", "cost, %", f"{result.target} ppl, %", "endless, %", "runs"]
    seen = (
        f"with a character of {result.target}'s script, and with any foreign script"
        if by_script
        else f"with a span of {result.target}'s words"
    )
    caption = (
        f"Weights have the lowest hazard on validation prompts at {max(result.budgets):g} % {result.cost_name} or "
        f"less there; (!) marks those that cost more. Switched: sampled responses {seen}. Against SFT: change of "
        "switched, then of the hazard, each run against SFT with the same base model and seed. Expected: share of "
        f"responses expected to switch. Cost: rise of {result.cost_name} against SFT; then of {result.target}'s own "
        f"perplexity. Endless: responses that repeat without end. {_interval_note(result)}{_zero_note(result)}"
    )
    return Table("chosen weights, on test prompts", columns, rows, caption)


def equal_cost_table(result: CellResult, budget: float) -> Table:
    """Table of every arm read off its own curve at one budget, and the best SAE arm less every control."""
    at = result.budgets[budget]
    measures = [measure for measure in _SWITCHING if at.arms[measure]]
    rows: list[list[Cell]] = []
    for arm, title in result.titles.items():
        sae = arm in result.sae_arms
        effects = [show(at.arms[measure][arm].effect) if arm in at.arms[measure] else None for measure in measures]
        hazard = at.arms["hazard"][arm]
        cap = f"cap, {hazard.capped} of {len(hazard.runs)}" if hazard.capped else None
        differences: list[Cell] = []
        for measure in measures:
            compared = not sae and at.best_sae is not None
            differences.append(show(at.difference(measure, str(at.best_sae), arm)) if compared else None)
        best = " *" if arm == at.best_sae else ""
        target = show(at.arms["target_ppl"][arm].effect)
        rows.append([title + best, sae, *effects, target, cap, *differences])
    columns = ["arm", "SAE", *(f"{measure}, %" for measure in measures), f"{result.target} ppl, %", "cap"]
    columns += [f"* less it: {measure}" for measure in measures]
    caption = (
        f"Change against SFT where a run's own curve over weights first costs {budget:g} % {result.cost_name}, log "
        "effects interpolated linearly from SFT through the weights. cap: runs in which no weight costs that much "
        "and the strongest counts. * is the SAE arm with the lowest hazard on validation prompts; 'less it' is its "
        "effect minus the control's in points, paired by base model and seed: below 0 the SAE arm switches less. "
        "Sampled: of (k + 1/2) / (n + 1), so that no count is 0. " + _interval_note(result)
    )
    return Table(f"at {budget:g} % {result.cost_name}, on test prompts", columns, rows, caption)


def pairs_table(result: CellResult, budget: float, measure: Measure = "hazard") -> Table:
    """Table of every SAE arm minus every control."""
    at = result.budgets[budget]
    rows: list[list[Cell]] = []
    for arm in result.sae_arms:
        cells: list[Cell] = [result.titles[arm]]
        for control in result.controls:
            difference = at.difference(measure, arm, control)
            mark = "" if difference is None else {"better": " +", "worse": " -"}.get(outcome_of(difference), "")
            cells.append(show(difference) + mark)
        rows.append(cells)
    caption = (
        f"Change of the {measure} at {budget:g} % {result.cost_name}: SAE arm minus control in points, paired by base "
        "model and seed. + the interval shows the SAE arm to switch less, - to switch more; with neither sign no "
        "difference is shown. Not corrected for the number of pairs. " + _interval_note(result)
    )
    columns = ["SAE arm", *(result.titles[control] for control in result.controls)]
    return Table(f"SAE arms less controls, {measure}", columns, rows, caption)


def languages_table(result: CellResult) -> Table:
    """Table of the change of the hazard per language."""
    names = next(list(arm.languages) for arm in result.chosen if arm.languages)
    rows: list[list[Cell]] = []
    for arm in result.chosen:
        if arm.choice is not None:
            cells = [show(arm.languages.get(name)) for name in names]
            rows.append([arm.title, arm.choice.weight, *cells])
    acted = result.penalised
    columns = [f"{name}, %" if acted is None or name in acted else f"{name} (not penalised), %" for name in names]
    caption = (
        "Change of the hazard against SFT on the prompts of one language, chosen weights, test prompts. "
        + ("" if result.identify == "script" else "The hazard is that of a list of tokens frequent in the target. ")
        + _interval_note(result)
    )
    return Table("hazard by language", ["arm", "weight", *columns], rows, caption)


def runs_table(result: CellResult) -> Table:
    """Table of every run."""
    rows: list[list[Cell]] = []
    for row in sorted(result.rows, key=lambda row: (row.base, row.seed)):
        counts, m = row.sampled, row.test
        shares: list[Cell] = [None] * 3
        if counts is not None:
            shares = [100 * count / counts.prompts for count in (counts.target, counts.any, counts.endless)]
        measured = [1000 * m.hz, 100 * m.csx, m.entry, m.masked_ppl, m.ppl, m.target_ppl]
        rows.append([row.base, row.seed, row.title, row.weight or None, *shares, *measured])
    columns = ["base", "seed", "arm", "weight", "switched, %", "any, %", "endless, %", "hazard x 1e3", "expected, %"]
    columns += ["entry, nats", "masked ppl", "ppl", f"{result.target} ppl"]
    caption = "On test prompts. Entry: mean log-probability of the first target token where a held-out text switches."
    return Table("every run", columns, rows, caption)


def _titled(arm: ArmAtWeight) -> str:
    return arm.title if arm.choice is None or arm.choice.affordable else f"{arm.title} (!)"


def _share(share: Interval | None) -> Cell:
    return None if share is None else f"{share.estimate:.1f} ({share.low:.1f} .. {share.high:.1f})"


def _cost(arm: ArmAtWeight) -> Cell:
    if arm.cost is None:
        return None
    low, high = arm.cost.low, arm.cost.high
    return f"{arm.cost.estimate:+.2f}" + ("" if low != low else f" ({low:+.2f} .. {high:+.2f})")


def _interval_note(result: CellResult) -> str:
    if result.bases >= FEWEST_BASES:
        return f"Intervals: 95 %, t over the means of {result.bases} base models."
    few = "is only 1 base model" if result.bases == 1 else f"are only {result.bases} base models"
    return (
        f"Intervals: 95 %, t over runs, as there {few}; they leave out how base models differ. A dash or a bare "
        "number: a single run, or nothing to compare."
    )


def _zero_note(result: CellResult) -> str:
    undefined = [arm for arm in result.chosen if arm.choice is not None and arm.switched and not arm.sampled_change]
    return " Without a change against SFT: SFT never switched in one of its runs." if undefined else ""
