"""Rows of a repetition experiment as typed values, each beside the run of another arm with the same base and seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from benchmarks.experiments.arms import REPETITION_ARMS as ARMS
from benchmarks.experiments.probes import Probes
from benchmarks.testbed.repetition.config import PLAIN
from benchmarks.testbed.repetition.experiment import START, Quality
from qscope_posttrain.errors import UserValueError

KIND = "repetition"


@dataclass(frozen=True)
class RepetitionRow:
    """One run: an arm, trained with a seed from the start checkpoint of a base; or the start itself, sampled."""

    cell: str
    base: int
    arm: str
    title: str
    seed: int
    quality: Quality
    """On held-out problems."""
    benign: Quality
    """On problems whose steps are rightly equal."""
    probes: Mapping[int, Probes]
    """By update; 0 is the start."""
    negatives: int
    """Rows that were steered, seeded or copied, over all updates."""
    looped: int
    """Those of them that repeat without end."""
    gradient_norm: float | None
    """Mean over updates, before clipping; None without training."""
    seconds: float
    folder: str
    way: tuple[str, str] | None
    """The way to steer that the arm asks for, and the one in use; None if it does not steer."""

    @property
    def key(self) -> tuple[int, int]:
        """(base, seed): runs of two arms with the same key are a pair."""
        return self.base, self.seed

    @property
    def looped_share(self) -> float | None:
        """Share of the negatives that repeat without end."""
        return self.looped / self.negatives if self.negatives else None

    @property
    def last_probes(self) -> Probes:
        """After the last update."""
        return self.probes[max(self.probes)]


@dataclass(frozen=True)
class Pair:
    """A run and that of another arm from the same start with the same seed: the same problems, in the same order."""

    run: RepetitionRow
    reference: RepetitionRow


def repetition_rows(rows: Iterable[Mapping[str, Any]]) -> list[RepetitionRow]:
    """Parse the rows of kind "repetition"; rows of another kind are left out.

    Raises:
        ValueError: a key is missing, counts do not fit together, or two rows are of the same cell, base, arm and seed.
    """
    parsed = [_parse(row) for row in rows if row.get("kind") == KIND]
    seen: set[tuple[Any, ...]] = set()
    for row in parsed:
        key = (row.cell, row.base, row.arm, row.seed)
        if key in seen:
            raise UserValueError(f"two rows of {_name(row)}; keep one.")
        seen.add(key)
    return parsed


def by_arm(rows: Iterable[RepetitionRow]) -> dict[str, list[RepetitionRow]]:
    """The runs of each arm by base and seed: the start first, then plain, then in the order of `ARMS`."""
    order = {name: place for place, name in enumerate((START, *ARMS))}
    found: dict[str, list[RepetitionRow]] = {}
    for row in sorted(rows, key=lambda row: row.key):
        found.setdefault(row.arm, []).append(row)
    return {name: found[name] for name in sorted(found, key=lambda name: order.get(name, len(order)))}


def pair_up(runs: Sequence[RepetitionRow], references: Sequence[RepetitionRow]) -> list[Pair]:
    """The runs that have a partner with the same base and seed among `references`, beside it."""
    partners = {row.key: row for row in references}
    return [Pair(run, partners[run.key]) for run in runs if run.key in partners]


def accuracy_difference(pair: Pair) -> float:
    """Right answers on held-out problems minus the reference's, in points."""
    return 100 * (_right(pair.run.quality) - _right(pair.reference.quality))


def benign_difference(pair: Pair) -> float:
    """Right answers on benign problems minus the reference's, in points."""
    return 100 * (_right(pair.run.benign) - _right(pair.reference.benign))


def loop_difference(pair: Pair) -> float:
    """Loops on held-out problems minus the reference's, in 10,000 samples."""
    return 1e4 * (_loops(pair.run.quality) - _loops(pair.reference.quality))


def check_references(rows: Sequence[RepetitionRow]) -> None:
    """Raise ValueError if a run has no plain DAPO from the same start with the same seed to be compared with."""
    plain = {(row.cell, *row.key) for row in rows if row.arm == PLAIN}
    for row in rows:
        if (row.cell, *row.key) not in plain:
            raise UserValueError(f"{_name(row)} has no row of arm '{PLAIN}' with its base and seed; run that too.")


def _right(quality: Quality) -> float:
    return quality.right / quality.samples


def _loops(quality: Quality) -> float:
    return quality.loops / quality.samples


def _parse(row: Mapping[str, Any]) -> RepetitionRow:
    try:
        steered, steering = row["steered"] or {"rows": 0, "looped": 0}, row.get("steering")
        parsed = RepetitionRow(
            cell=row["cell"],
            base=row["base"],
            arm=row["arm"],
            title=row["title"],
            seed=row["seed"],
            quality=_quality(row["quality"]),
            benign=_quality(row["benign"]),
            probes={int(step): _probes(values) for step, values in row["probes"].items()},
            negatives=steered["rows"],
            looped=steered["looped"],
            gradient_norm=row["gradient_norm"],
            seconds=row["seconds"],
            folder=row["folder"],
            way=None if steering is None else (steering["asked"], steering["way"]),
        )
    except KeyError as error:
        place = {name: row.get(name) for name in ("cell", "base", "arm", "seed")}
        raise UserValueError(f"the repetition row {place} has no {error}.") from error
    _check(parsed)
    return parsed


def _quality(values: Mapping[str, Any]) -> Quality:
    return Quality(**{f.name: values[f.name] for f in fields(Quality)})


def _probes(values: Mapping[str, Any]) -> Probes:
    return Probes(**{f.name: values[f.name] for f in fields(Probes)})


def _check(row: RepetitionRow) -> None:
    for quality in (row.quality, row.benign):
        counts = (quality.loops, quality.unended, quality.right)
        if quality.samples < 1 or not all(0 <= count <= quality.samples for count in counts):
            raise UserValueError(f"{_name(row)}: counts must lie between 0 and the samples, got {quality}.")
    if not 0 <= row.looped <= row.negatives:
        raise UserValueError(f"{_name(row)}: {row.looped} of {row.negatives} negatives looped.")
    if not row.probes:
        raise UserValueError(f"{_name(row)} has no probes.")
    if row.gradient_norm is not None and not math.isfinite(row.gradient_norm):
        raise UserValueError(f"{_name(row)}: the gradient norm must be finite, got {row.gradient_norm}.")


def _name(row: RepetitionRow) -> str:
    return f"the run of arm '{row.arm}' (cell '{row.cell}', base {row.base}, seed {row.seed})"
