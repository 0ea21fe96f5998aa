"""What the numbers of a cell allow to be said: SAE arms against controls at equal cost, and whether the goal is met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.experiments.cell_results import ArmAtWeight, AtBudget, CellResult
from benchmarks.experiments.clustered import ClusteredInterval
from benchmarks.experiments.switching_rows import Measure
from qscope_posttrain.intervals import Interval

GOAL_REDUCTION = 50.0
"""Per cent less sampled switching than SFT."""
GOAL_COST = 1.0
"""Per cent of (masked) perplexity, at most."""

Outcome = Literal["better", "worse", "no difference shown"]
_NAMES: dict[Measure, str] = {
    "hazard": "hazard of switching",
    "expected": "expected switching",
    "sampled": "sampled switching",
    "target_ppl": "the target language's own perplexity",
}


@dataclass(frozen=True)
class Verdict:
    """What was found in a cell."""

    cell: str
    outcome: Outcome | None
    """The best SAE arm against the best control, by the hazard at the largest budget; None without both."""
    better_than: tuple[str, ...]
    """Controls that the best SAE arm beats there with an interval that excludes 0."""
    worse_than: tuple[str, ...]
    undecided: tuple[str, ...]
    """Controls to which no difference was shown."""
    goal_met: tuple[str, ...]
    """Arms whose chosen weight switches at least 50 % less by the estimate, and less by the whole interval, at 1 % or
    less."""
    lines: tuple[str, ...]
    """The same in words."""


def outcome_of(difference: ClusteredInterval) -> Outcome:
    """What an effect minus a control's says; less switching is better."""
    if not difference.excludes_zero:
        return "no difference shown"
    return "better" if difference.estimate < 0 else "worse"


def cell_verdict(result: CellResult) -> Verdict:
    """The verdict on one cell, from the largest budget."""
    budget = max(result.budgets)
    at = result.budgets[budget]
    groups: dict[Outcome, list[str]] = {"better": [], "worse": [], "no difference shown": []}
    outcome = None
    if at.best_sae is not None:
        for control in result.controls:
            difference = at.difference("hazard", at.best_sae, control)
            if difference is not None:
                groups[outcome_of(difference)].append(control)
                outcome = outcome_of(difference) if control == at.best_control else outcome
    met = [arm for arm in result.chosen if meets_goal(arm)]
    lines = [_comparison(result, at, budget, measure) for measure in ("hazard", "sampled", "target_ppl")]
    lines += [_alone(result, at), _against_all(result, groups), _goal(result, met)]
    return Verdict(
        cell=result.cell,
        outcome=outcome,
        better_than=tuple(groups["better"]),
        worse_than=tuple(groups["worse"]),
        undecided=tuple(groups["no difference shown"]),
        goal_met=tuple(arm.arm for arm in met),
        lines=tuple(line for line in lines if line),
    )


def meets_goal(arm: ArmAtWeight) -> bool:
    """Half of SFT's sampled switching or less, the whole interval of the change below 0, within the cost on test."""
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


def interval_basis(interval: ClusteredInterval, bases: int) -> str:
    """What an interval is over, in words."""
    models = "base model" if bases == 1 else "base models"
    if interval.unit == "bases":
        return f"95 % t intervals over {interval.count} base models"
    if interval.count == 1:
        return "a single run: no intervals"
    return f"95 % t intervals over {interval.count} runs of {bases} {models}, which leave out how base models differ"


def _comparison(result: CellResult, at: AtBudget, budget: float, measure: Measure) -> str:
    """Best SAE arm against best control on one measure."""
    arms, head = at.arms[measure], f"At {budget:g} % {result.cost_name}, {_NAMES[measure]}"
    best, control, difference = at.best_sae, at.best_control, None
    if best is None:
        return f"{head}: no SAE arm was run."
    if best not in arms:
        return ""
    parts = [f"best SAE arm **{result.titles[best]}** {show(arms[best].effect, ' %')}"]
    if control is not None and control in arms:
        parts.append(f"best control **{result.titles[control]}** {show(arms[control].effect, ' %')}")
        difference = at.difference(measure, best, control)
    if difference is not None:
        parts.append(f"difference {show(difference, ' points')}: {_wording(difference)}")
    for arm in (best, control):
        if arm is not None and arm in arms and arms[arm].capped:
            runs = f"{arms[arm].capped} of {len(arms[arm].runs)} runs"
            parts.append(
                f"{result.titles[arm]} ends below the budget in {runs} and counts at its strongest weight there"
            )
    note = interval_basis(difference or arms[best].effect, result.bases)
    return f"{head}: {'; '.join(parts)} ({note})."


def _alone(result: CellResult, at: AtBudget) -> str:
    """The best SAE arm without a token penalty in it, where the best one has one."""
    arm, control = at.best_sae_alone, at.best_control
    if arm is None or arm == at.best_sae:
        return ""
    text = f"The best SAE arm without a token penalty is **{result.titles[arm]}**, hazard "
    text += show(at.arms["hazard"][arm].effect, " %")
    difference = None if control is None else at.difference("hazard", arm, control)
    if difference is None or control is None:
        return f"{text}."
    return f"{text}; less {result.titles[control]} {show(difference, ' points')}: {_wording(difference)}."


def _wording(difference: ClusteredInterval) -> str:
    outcome = outcome_of(difference)
    if outcome == "no difference shown":
        return "no difference shown"
    return f"the SAE arm is {outcome}, the interval excludes 0"


def _against_all(result: CellResult, groups: dict[Outcome, list[str]]) -> str:
    names: dict[Outcome, str] = {
        "better": "better than",
        "no difference shown": "not shown to differ from",
        "worse": "worse than",
    }
    said = [f"{words} {_titles(result, groups[outcome])}" for outcome, words in names.items() if groups[outcome]]
    return f"By hazard the best SAE arm is: {'; '.join(said)}." if said else ""


def _goal(result: CellResult, met: Sequence[ArmAtWeight]) -> str:
    goal = (
        f"at least {GOAL_REDUCTION:g} % less sampled switching than SFT by the estimate, less by the whole interval, "
        f"at {GOAL_COST:g} % or less {result.cost_name}, weights chosen on validation prompts"
    )
    if all(arm.sampled_change is None for arm in result.chosen):
        return f"Goal ({goal}): cannot be said, there are no samples to compare."
    if met:
        return f"Goal ({goal}): met by {'; '.join(_reached(arm) for arm in met)}."
    tried = [arm for arm in result.chosen if arm.choice is not None and arm.sampled_change is not None]
    within = [arm for arm in tried if arm.cost is not None and arm.cost.estimate <= GOAL_COST]
    said = [f"the largest reduction at that cost is {_reached(min(within, key=_change))}"] if within else []
    over = [arm for arm in tried if arm not in within and _change(arm) <= -GOAL_REDUCTION]
    if over:
        said.append(f"at a higher one there are {'; '.join(_reached(arm) for arm in sorted(over, key=_cost))}")
    return f"Goal ({goal}): met by no arm{''.join(f'; {part}' for part in said)}."


def _change(arm: ArmAtWeight) -> float:
    return math.inf if arm.sampled_change is None else arm.sampled_change.estimate


def _cost(arm: ArmAtWeight) -> float:
    return math.inf if arm.cost is None else arm.cost.estimate


def _reached(arm: ArmAtWeight) -> str:
    change, cost = arm.sampled_change, arm.cost
    kind = "SAE" if arm.sae else "no SAE"
    far = change is not None and change.high <= -GOAL_REDUCTION
    whole = f", the whole interval at {-GOAL_REDUCTION:g} % or below" if far else ""
    price = "" if cost is None else f" at {cost.estimate:+.3f} %"
    return f"**{arm.title}** ({kind}): {show(change, ' %')}{whole}{price}"


def _titles(result: CellResult, arms: Sequence[str]) -> str:
    return ", ".join(result.titles[arm] for arm in arms)
