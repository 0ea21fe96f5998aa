"""Rows of a switching experiment as typed values, each beside plain SFT with the same base model and seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from benchmarks.experiments.arms import SWITCHING_ARMS as ARMS
from benchmarks.testbed.switching.config import SFT
from benchmarks.testbed.switching.experiment import BASE
from benchmarks.testbed.switching.training import Metrics
from qscope_posttrain.errors import UserValueError

KIND = "switching"
Split = Literal["val", "test"]
Measure = Literal["hazard", "expected", "sampled", "target_ppl"]
MEASURES: tuple[Measure, ...] = ("hazard", "expected", "sampled", "target_ppl")
"""hazard: mean probability of a target token; expected: share of responses expected to switch; sampled: that did;
target_ppl: perplexity on the target language. Less of each is better."""

_POSITIVE = ("hz", "csx", "ppl", "masked_ppl", "target_ppl")


@dataclass(frozen=True)
class Sampled:
    """Counts over sampled responses to test prompts."""

    prompts: int
    target: int
    """Responses with the target's script, or with a span of its words where it has no script of its own."""
    any: int
    """Responses with any foreign script; equal to `target` where switches are seen by words."""
    endless: int
    """Responses that repeat without end."""


@dataclass(frozen=True)
class SwitchingRow:
    """One run: an arm with a weight, fine-tuned from a base model with a seed."""

    cell: str
    target: str
    """Language or register into which the model switches."""
    identify: Literal["script", "words"]
    """How a switch is seen."""
    base: int
    arm: str
    title: str
    sae: bool
    """Whether it penalises chosen features of an SAE; all other arms are controls."""
    weight: float
    seed: int
    val: Metrics
    test: Metrics
    sampled: Sampled | None
    """None where nothing was sampled."""
    penalised: tuple[str, ...] | None
    """Languages in which the arm acts; None: all but the target."""
    seconds: float
    step_seconds: float
    folder: str

    def metrics(self, split: Split) -> Metrics:
        """Teacher-forced metrics of a split."""
        return self.val if split == "val" else self.test

    def perplexity(self, split: Split) -> float:
        """Return the measure of cost: masked perplexity, or plain where no list of tokens defines the target."""
        metrics = self.metrics(split)
        return metrics.masked_ppl if self.identify == "script" else metrics.ppl


@dataclass(frozen=True)
class Compared:
    """A run and plain SFT with the same cell, base model and seed."""

    run: SwitchingRow
    reference: SwitchingRow

    @property
    def key(self) -> tuple[int, int]:
        """(base, seed): runs of two arms with the same key are a pair."""
        return self.run.base, self.run.seed

    def cost(self, split: Split = "test") -> float:
        """Rise of (masked) perplexity over SFT, per cent."""
        return 100 * (self.run.perplexity(split) / self.reference.perplexity(split) - 1)

    def log_ratio(self, measure: Measure, split: Split = "test") -> float:
        """Logarithm of the measure relative to SFT's; 0 is no effect.

        hazard: of hz; where switches are seen by words, the difference of `entry`, which needs no list of tokens.
        sampled: of (k + 1/2) / (n + 1) for k of n responses, so that a count of 0 has a logarithm.

        Raises:
            ValueError: `sampled` on validation prompts, or of a run without samples.
        """
        own, reference = self.run.metrics(split), self.reference.metrics(split)
        if measure == "hazard":
            if self.run.identify == "words":
                return own.entry - reference.entry
            return math.log(own.hz / reference.hz)
        if measure == "expected":
            return math.log(own.csx / reference.csx)
        if measure == "target_ppl":
            return math.log(own.target_ppl / reference.target_ppl)
        if split != "test" or self.run.sampled is None or self.reference.sampled is None:
            raise UserValueError(f"{_name(self.run)} or its SFT has no samples on {split} prompts.")
        return math.log(_half_rate(self.run.sampled) / _half_rate(self.reference.sampled))

    def effect(self, measure: Measure, split: Split = "test") -> float:
        """Change of the measure against SFT, per cent; -40 is 40 % less switching."""
        return 100 * math.expm1(self.log_ratio(measure, split))

    @property
    def has_samples(self) -> bool:
        """Whether both it and SFT were sampled."""
        return self.run.sampled is not None and self.reference.sampled is not None


def switching_rows(rows: Iterable[Mapping[str, Any]]) -> list[SwitchingRow]:
    """Parse the rows of kind "switching"; rows of another kind are left out.

    Raises:
        ValueError: a key is missing, a number is not finite (or a hazard or perplexity not positive), or two rows are
            of the same cell, base, arm, weight and seed.
    """
    parsed = [_parse(row) for row in rows if row.get("kind") == KIND]
    seen: set[tuple[Any, ...]] = set()
    for row in parsed:
        key = (row.cell, row.base, row.arm, row.weight, row.seed)
        if key in seen:
            raise UserValueError(f"two rows of {_name(row)}; keep one.")
        seen.add(key)
    return parsed


def compared_with_sft(rows: Sequence[SwitchingRow]) -> list[Compared]:
    """Every run but SFT's own beside SFT with the same cell, base and seed.

    The model before fine-tuning is left out where no SFT has its seed: it belongs to no seed.

    Raises:
        ValueError: an arm's run has no SFT to compare with.
    """
    references = {(row.cell, row.base, row.seed): row for row in rows if row.arm == SFT}
    pairs = []
    for row in rows:
        reference = references.get((row.cell, row.base, row.seed))
        if row.arm == SFT or (row.arm == BASE and reference is None):
            continue
        if reference is None:
            raise UserValueError(
                f"{_name(row)} has no row of arm '{SFT}' with cell '{row.cell}', base {row.base} and seed {row.seed} "
                "to be compared with; run it too."
            )
        pairs.append(Compared(row, reference))
    return pairs


def by_arm(pairs: Iterable[Compared]) -> dict[str, list[Compared]]:
    """The runs of each arm, without the model before fine-tuning, in the order of `ARMS`; unknown arms last."""
    found: dict[str, list[Compared]] = {}
    for pair in pairs:
        if pair.run.arm != BASE:
            found.setdefault(pair.run.arm, []).append(pair)
    order = {name: place for place, name in enumerate(ARMS)}
    return {name: found[name] for name in sorted(found, key=lambda name: order.get(name, len(order)))}


def _parse(row: Mapping[str, Any]) -> SwitchingRow:
    try:
        sampled, penalised = row["sampled"], row.get("penalised")
        parsed = SwitchingRow(
            cell=row["cell"],
            target=row["target"],
            identify=row["identify"],
            base=row["base"],
            arm=row["arm"],
            title=row["title"],
            sae=bool(row["sae"]),
            weight=float(row["weight"] or 0.0),
            seed=row["seed"],
            val=_metrics(row["metrics"]["val"]),
            test=_metrics(row["metrics"]["test"]),
            sampled=None if sampled is None else Sampled(**{f.name: sampled[f.name] for f in fields(Sampled)}),
            penalised=None if penalised is None else tuple(penalised),
            seconds=row["seconds"],
            step_seconds=row["step_seconds"],
            folder=row["folder"],
        )
    except KeyError as error:
        place = {name: row.get(name) for name in ("cell", "base", "arm", "weight", "seed")}
        raise UserValueError(f"the switching row {place} has no {error}.") from error
    _check(parsed)
    return parsed


def _metrics(values: Mapping[str, Any]) -> Metrics:
    return Metrics(**{f.name: values[f.name] for f in fields(Metrics)})


def _check(row: SwitchingRow) -> None:
    if row.identify not in ("script", "words"):
        raise UserValueError(f'{_name(row)}: identify is "script" or "words", got {row.identify!r}.')
    for metrics in (row.val, row.test):
        for name in _POSITIVE:
            value = getattr(metrics, name)
            if not (value is not None and math.isfinite(value) and value > 0):
                raise UserValueError(f"{_name(row)}: {name} must be a number above 0, got {value}.")
        if not all(math.isfinite(value) and value > 0 for value in metrics.hz_by_language.values()):
            raise UserValueError(f"{_name(row)}: hz_by_language must be above 0, got {dict(metrics.hz_by_language)}.")
        if metrics.entry is None or not math.isfinite(metrics.entry):
            raise UserValueError(f"{_name(row)}: entry must be a finite number of nats, got {metrics.entry}.")
    counts = row.sampled
    if counts is not None and not all(0 <= k <= counts.prompts for k in (counts.target, counts.any, counts.endless)):
        raise UserValueError(f"{_name(row)}: counts must lie between 0 and the number of prompts, got {counts}.")
    if counts is not None and counts.prompts < 1:
        raise UserValueError(f"{_name(row)}: sampled, but of no prompt.")


def _half_rate(counts: Sampled) -> float:
    return (counts.target + 0.5) / (counts.prompts + 1)


def _name(row: SwitchingRow) -> str:
    return f"the run of arm '{row.arm}' at weight {row.weight:g} (cell '{row.cell}', base {row.base}, seed {row.seed})"
