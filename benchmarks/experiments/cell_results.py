"""The numbers of one cell of a switching experiment: arms at their chosen weights, at equal cost, pairwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.experiments.choice import Choice, choose_weights
from benchmarks.experiments.clustered import ClusteredInterval, clustered_interval, clustered_rate
from benchmarks.experiments.equal_cost import BUDGETS, ArmAtCost, arm_at_cost, paired_difference
from benchmarks.experiments.grouping import by_base, by_cell
from benchmarks.experiments.switching_rows import MEASURES, Compared, Measure, SwitchingRow, by_arm, compared_with_sft
from benchmarks.testbed.switching.config import SFT
from benchmarks.testbed.switching.experiment import BASE
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval


@dataclass(frozen=True)
class ArmAtWeight:
    """An arm at one weight on test prompts. Shares are per cent; changes are per cent against SFT, pair by pair."""

    arm: str
    title: str
    sae: bool
    choice: Choice | None
    """How the weight was chosen; None for SFT and the model before it."""
    runs: int
    switched: Interval | None
    """Sampled responses with the target's script or words; None where nothing was sampled."""
    any: Interval | None
    endless: Interval | None
    expected: float
    """Share of responses expected to switch."""
    target_perplexity: float
    sampled_change: ClusteredInterval | None
    """Of `switched`; None without samples, or where an SFT never switched."""
    hazard_change: ClusteredInterval | None
    cost: ClusteredInterval | None
    """Of masked perplexity, or of plain where switches are seen by words."""
    target_cost: ClusteredInterval | None
    """Of the target language's perplexity."""
    languages: Mapping[str, ClusteredInterval]
    """Change of the hazard in each language."""


@dataclass(frozen=True)
class AtBudget:
    """All arms at one budget of perplexity."""

    arms: Mapping[Measure, Mapping[str, ArmAtCost]]
    """Measure -> arm; arms without samples are missing from "sampled"."""
    best_sae: str | None
    """The SAE arm that lowers the hazard most at this budget on validation prompts; None where there is none."""
    best_control: str | None
    """The same among the arms without an SAE."""

    def difference(self, measure: Measure, first: str, second: str) -> ClusteredInterval | None:
        """Effect of `first` minus that of `second` in points; None where they share no run."""
        arms = self.arms[measure]
        if first not in arms or second not in arms or not set(arms[first].runs) & set(arms[second].runs):
            return None
        return paired_difference(arms[first], arms[second])


@dataclass(frozen=True)
class CellResult:
    """One cell."""

    cell: str
    target: str
    identify: str
    penalised: tuple[str, ...] | None
    """Languages in which the arms act; None: all but the target."""
    titles: Mapping[str, str]
    """Of every arm, in the order of the tables, without SFT and the model before it."""
    sae_arms: tuple[str, ...]
    bases: int
    pairs: Mapping[str, Sequence[Compared]]
    """Arm -> its runs."""
    chosen: Sequence[ArmAtWeight]
    """The model before SFT, SFT, and every arm at its chosen weight."""
    budgets: Mapping[float, AtBudget]
    rows: Sequence[SwitchingRow]

    @property
    def cost_name(self) -> str:
        """Name of the measure of cost."""
        return "masked perplexity" if self.identify == "script" else "perplexity"

    @property
    def controls(self) -> tuple[str, ...]:
        """Arms without an SAE."""
        return tuple(arm for arm in self.titles if arm not in self.sae_arms)


def cell_results(rows: Sequence[SwitchingRow], budgets: Sequence[float] = BUDGETS) -> list[CellResult]:
    """The numbers of every cell. Weights are chosen at the largest budget.

    Raises:
        ValueError: a run without its SFT, a cell whose rows differ in target or in how switches are seen, or no budget.
    """
    if not budgets:
        raise UserValueError("give at least one budget of perplexity, for example 1 per cent.")
    return [_cell_result(cell, own, budgets) for cell, own in by_cell(rows).items()]


def _cell_result(cell: str, rows: Sequence[SwitchingRow], budgets: Sequence[float]) -> CellResult:
    kinds = {(row.target, row.identify, row.penalised) for row in rows}
    if len(kinds) > 1:
        raise UserValueError(
            f"cell '{cell}' mixes targets, ways to see a switch or penalised languages: {sorted(kinds)}."
        )
    target, identify, penalised = next(iter(kinds))
    pairs = compared_with_sft(rows)
    arms = by_arm(pairs)
    choices = choose_weights(pairs, max(budgets))
    sae_arms = tuple(arm for arm, runs in arms.items() if runs[0].run.sae)
    before = [row for row in rows if row.arm == BASE]
    paired_before = [pair for pair in pairs if pair.run.arm == BASE]
    chosen = [_at_weight(before, paired_before, None)] if before else []
    chosen.append(_at_weight([row for row in rows if row.arm == SFT], [], None))
    for arm, choice in choices.items():
        own = [pair for pair in arms[arm] if pair.run.weight == choice.weight]
        chosen.append(_at_weight([pair.run for pair in own], own, choice))
    return CellResult(
        cell=cell,
        target=target,
        identify=identify,
        penalised=penalised,
        titles={arm: runs[0].run.title for arm, runs in arms.items()},
        sae_arms=sae_arms,
        bases=len({row.base for row in rows}),
        pairs=arms,
        chosen=chosen,
        budgets={budget: _at_budget(arms, sae_arms, budget) for budget in budgets},
        rows=rows,
    )


def _at_budget(arms: Mapping[str, Sequence[Compared]], sae_arms: Sequence[str], budget: float) -> AtBudget:
    tables: dict[Measure, dict[str, ArmAtCost]] = {}
    for measure in MEASURES:
        tables[measure] = {}
        for arm, pairs in arms.items():
            usable = [pair for pair in pairs if pair.has_samples] if measure == "sampled" else pairs
            if usable:
                tables[measure][arm] = arm_at_cost(usable, budget, measure)
    validation = {arm: arm_at_cost(pairs, budget, "hazard", "val").effect.estimate for arm, pairs in arms.items()}
    controls = [arm for arm in arms if arm not in sae_arms]
    return AtBudget(
        arms=tables,
        best_sae=min(sae_arms, key=validation.__getitem__, default=None),
        best_control=min(controls, key=validation.__getitem__, default=None),
    )


def _at_weight(rows: Sequence[SwitchingRow], pairs: Sequence[Compared], choice: Choice | None) -> ArmAtWeight:
    first = rows[0]
    sampled = all(row.sampled is not None for row in rows)
    languages = [name for name in first.test.hz_by_language if name != first.target] if pairs else []
    return ArmAtWeight(
        arm=first.arm,
        title=first.title,
        sae=first.sae,
        choice=choice,
        runs=len(rows),
        switched=_rate(rows, "target") if sampled else None,
        any=_rate(rows, "any") if sampled else None,
        endless=_rate(rows, "endless") if sampled else None,
        expected=100 * fmean(row.test.csx for row in rows),
        target_perplexity=fmean(row.test.target_ppl for row in rows),
        sampled_change=_sampled_change(pairs),
        hazard_change=_over_bases(pairs, lambda pair: pair.effect("hazard")),
        cost=_over_bases(pairs, lambda pair: pair.cost()),
        target_cost=_over_bases(pairs, lambda pair: pair.effect("target_ppl")),
        languages={name: _language_change(pairs, name) for name in languages},
    )


def _rate(rows: Iterable[SwitchingRow], count: str) -> Interval:
    grouped: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        if row.sampled is not None:
            grouped.setdefault(row.base, []).append((getattr(row.sampled, count), row.sampled.prompts))
    found = clustered_rate(grouped)
    return Interval(100 * found.estimate, 100 * found.low, 100 * found.high)


def _over_bases(pairs: Sequence[Compared], value: Callable[[Compared], float]) -> ClusteredInterval | None:
    return clustered_interval(by_base(pairs, value)) if pairs else None


def _sampled_change(pairs: Sequence[Compared]) -> ClusteredInterval | None:
    """Change of the sampled share; undefined where an SFT never switched."""

    def change(pair: Compared) -> float:
        own, reference = pair.run.sampled, pair.reference.sampled
        if own is None or reference is None:
            raise UserValueError("a change of sampled switching needs samples of both runs.")
        return 100 * (own.target * reference.prompts / (own.prompts * reference.target) - 1)

    counts = [pair.reference.sampled for pair in pairs]
    if not pairs or not all(pair.has_samples for pair in pairs) or any(n is None or n.target == 0 for n in counts):
        return None
    return clustered_interval(by_base(pairs, change))


def _language_change(pairs: Sequence[Compared], language: str) -> ClusteredInterval:
    def change(pair: Compared) -> float:
        return 100 * (pair.run.test.hz_by_language[language] / pair.reference.test.hz_by_language[language] - 1)

    return clustered_interval(by_base(pairs, change))
