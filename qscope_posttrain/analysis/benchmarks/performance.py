"""Compare benchmarks by the scores of models, redundancy R (Eq. 4 to 6) and similarity of pairs (Eq. 12), and test
whether features agree with them, with size as the control.

Tests and intervals resample BENCHMARKS, since the pairs of benchmarks are far from independent: a permutation relabels
the benchmarks of one side (Mantel 1967), the bootstrap draws benchmarks and takes the pairs of different ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from qscope_posttrain.analysis.benchmarks.overlap import OverlapMatrix
from qscope_posttrain.analysis.benchmarks.redundancy import Redundancy, curve_sizes
from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.files import read_csv

MIN_MODELS = 3


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of M models on benchmarks."""

    models: tuple[str, ...]
    benchmarks: tuple[str, ...]
    scores: NDArray[np.float64]  # [M, benchmarks]

    def __post_init__(self) -> None:
        shape = (len(self.models), len(self.benchmarks))
        if self.scores.shape != shape:
            raise UserValueError(f"scores of {shape[0]} models on {shape[1]} benchmarks, got {self.scores.shape}.")
        if len(self.models) < MIN_MODELS:
            raise UserValueError(f"at least {MIN_MODELS} models are needed, got {len(self.models)}.")
        if not np.isfinite(self.scores).all():
            raise UserValueError("every model needs a score on every benchmark.")

    def column(self, benchmark: str) -> NDArray[np.float64]:
        """[M] scores on one benchmark."""
        if benchmark not in self.benchmarks:
            raise UserValueError(f"no scores for '{benchmark}'; the table has {', '.join(self.benchmarks)}.")
        return self.scores[:, self.benchmarks.index(benchmark)]

    def similarity(self, names: Sequence[str], control: str | None = None) -> NDArray[np.float64]:
        """[B, B] Pearson correlation over models of the scores on two benchmarks. With a control, that benchmark is
        partialled out of every pair (Eq. 12)."""
        every = [*names, *([] if control is None else [control])]
        columns = np.stack([self.column(name) for name in every])
        flat = [name for name, column in zip(every, columns, strict=True) if np.ptp(column) == 0]
        if flat:
            raise UserValueError(f"all models have the same score on {', '.join(flat)}: no correlation.")
        r = np.clip(np.corrcoef(columns), -1.0, 1.0)
        if control is None:
            return r
        with_control = r[:-1, -1]
        return partial_correlation(r[:-1, :-1], with_control[:, None], with_control[None, :])


@dataclass(frozen=True)
class PerformanceRedundancy:
    """R of one benchmark."""

    name: str
    items: int
    models: int
    r: float
    error: float  # Standard error over the random orders; it does not cover the choice of models
    repeats: int


def partial_correlation(xy: ArrayLike, xm: ArrayLike, ym: ArrayLike) -> NDArray[np.float64]:
    """Eq. 12: (r_xy - r_xm r_ym) / sqrt((1 - r_xm^2) (1 - r_ym^2)); NaN where a side is the control itself."""
    xy, xm, ym = (np.asarray(side, dtype=np.float64) for side in (xy, xm, ym))
    square = (1 - xm**2) * (1 - ym**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(square > 1e-12, (xy - xm * ym) / np.sqrt(np.maximum(square, 0)), np.nan)


def read_scores(path: str | Path) -> ScoreTable:
    """Read a CSV file: one row per model with its name in the first column, one column per benchmark."""
    header, rows = _read_csv(path)
    models = tuple(row[0] for row in rows)
    scores = _numbers([row[1:] for row in rows], path)
    try:
        return ScoreTable(models, tuple(header[1:]), scores)
    except UserValueError as error:
        raise UserValueError(f"{path}: {error}") from error


def read_correctness(folder: str | Path, names: Sequence[str]) -> dict[str, tuple[tuple[str, ...], NDArray]]:
    """Read the files `<benchmark>.csv` that exist: one column per model with its name on top, one row per item, 0 to 1.

    Returns {benchmark: (models, correct [N, M])}.
    """
    files = {name: Path(folder) / f"{name}.csv" for name in names}
    there = {name: path for name, path in files.items() if path.is_file()}
    if not there:
        raise UserFileNotFoundError(f"no <benchmark>.csv in '{folder}' for any of {', '.join(names)}.")
    found = {}
    for name, path in there.items():
        header, rows = _read_csv(path)
        found[name] = (tuple(header), _numbers(rows, path))
    return found


def scores_of(correctness: Mapping[str, tuple[tuple[str, ...], NDArray]]) -> ScoreTable:
    """Table of mean correctness; all files must have the same models in the same order."""
    models = {found[0] for found in correctness.values()}
    if len(models) != 1:
        raise UserValueError("the files of per-item correctness have different models or orders of them.")
    means = np.stack([correct.mean(axis=0) for _, correct in correctness.values()], axis=1)
    return ScoreTable(next(iter(models)), tuple(correctness), means)


def read_performance(
    sizes: Mapping[str, int], correctness: str | None, scores: str | None = None
) -> tuple[dict[str, tuple[tuple[str, ...], NDArray[np.float64]]], ScoreTable | None]:
    """Read per-item correctness by benchmark (empty without a folder), and scores from a table or as its means. `sizes`
    has the number of items of each benchmark."""
    table = None if scores is None else read_scores(scores)
    if correctness is None:
        return {}, table
    found = read_correctness(correctness, list(sizes))
    for name, (_, correct) in found.items():
        if len(correct) != sizes[name]:
            raise UserValueError(
                f"{correctness}/{name}.csv has {len(correct)} items, the benchmark {sizes[name]}: they must be the "
                "same, in the same order."
            )
    return found, table or scores_of(found)


def performance_redundancy(name: str, correct: ArrayLike, *, repeats: int = 50, seed: int = 0) -> PerformanceRedundancy:
    """R(D) = (1/N) sum_n E tau(S, D), with tau Kendall's correlation between the models' accuracies on all items and on
    a random subset of n (Eq. 4 to 6). `correct` [N, M] is the correctness of each item by each model.

    The subsets of one repeat are the first n items of a random order. tau is tau-b, for small subsets tie many models;
    a subset that ties all of them counts 0 (the report does not say). Between the sizes of `curve_sizes` tau_n is
    interpolated.
    """
    outcomes = np.asarray(correct, dtype=np.float64)
    full = outcomes.mean(axis=0)
    if np.ptp(full) == 0:
        raise UserValueError(f"'{name}': all models have the same accuracy, so that there is no order to keep.")
    items = len(outcomes)
    generator = np.random.default_rng(seed)
    sizes, every = curve_sizes(items), np.arange(1, items + 1)
    found = []
    for _ in range(repeats):
        sums = np.cumsum(outcomes[generator.permutation(items)], axis=0)[sizes - 1]
        found.append(float(np.interp(every, sizes, kendall(full, sums / sizes[:, None])).mean()))
    error = float(np.std(found, ddof=1)) / math.sqrt(repeats) if repeats > 1 else math.nan
    return PerformanceRedundancy(name, items, outcomes.shape[1], float(np.mean(found)), error, repeats)


def kendall(full: ArrayLike, parts: ArrayLike) -> NDArray[np.float64]:
    """Kendall's tau-b between `full` [M] and each row of `parts` [sizes, M]; 0 where a row is constant. Rounded, so
    that sums of the same numbers in another order tie."""
    reference, rows = np.round(np.asarray(full), 12), np.round(np.asarray(parts), 12)
    one, two = np.triu_indices(len(reference), 1)
    order = np.sign(reference[one] - reference[two])
    orders = np.sign(rows[:, one] - rows[:, two])
    untied = np.sqrt(np.square(order).sum() * np.square(orders).sum(axis=1))
    return np.divide(orders @ order, untied, out=np.zeros(len(rows)), where=untied > 0)


def _read_csv(path: str | Path) -> tuple[list[str], list[list[str]]]:
    rows = list(read_csv(path))
    if len(rows) < 2:
        raise UserValueError(f"{path}: expected a header and rows of as many cells; it has {len(rows)} rows.")
    header = rows[0][1]
    for number, cells in rows:
        if len(cells) != len(header):
            raise UserValueError(
                f"{path}, line {number}: expected a header and rows of as many cells; {len(cells)} for {len(header)}."
            )
    return header, [cells for _, cells in rows[1:]]


def _numbers(rows: Sequence[Sequence[str]], path: str | Path) -> NDArray[np.float64]:
    try:
        return np.array([[float(cell) for cell in row] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise UserValueError(f"{path}: {error}.") from error


Kind = Literal["pearson", "spearman"]

MIN_BENCHMARKS = 4
_ROUNDING = 1e-12
_ORDERS_AT_ONCE = 500


@dataclass(frozen=True)
class Correlation:
    """A coefficient with its test over benchmarks."""

    kind: Kind
    value: float
    low: float
    high: float  # Percentile bootstrap over benchmarks. Too narrow for few of them: under ten or so, read the p value.
    p: float  # Two-sided, by permutation of benchmarks: of all of them where there are no more than `permutations`
    benchmarks: int
    points: int  # Number of benchmarks, or of pairs of them


@dataclass(frozen=True)
class Agreement:
    """Correlation of a number from features, or from sizes, with one from performance."""

    predictor: str
    target: str
    correlation: Correlation


def redundancy_agreement(
    features: Sequence[Redundancy], performance: Mapping[str, PerformanceRedundancy], *, seed: int = 0
) -> tuple[list[Agreement], float]:
    """Spearman over benchmarks of R with R-hat, with the size-matched R-hat, and with N alone; and the partial rank
    correlation of R and R-hat given N (Eq. 12 on ranks)."""
    both = [found for found in features if found.name in performance]
    if len(both) < MIN_BENCHMARKS:
        raise UserValueError(f"R and R-hat need {MIN_BENCHMARKS} benchmarks with both, got {len(both)}.")
    r = [performance[found.name].r for found in both]
    r_hat = [found.r_hat.estimate for found in both]
    items = [float(found.items) for found in both]
    matched = [found.r_hat_matched.estimate for found in both]
    predictors = {"R-hat": r_hat, "R-hat, size-matched": matched, "N alone (control)": items}
    lines = [Agreement(name, "R", correlate(values, r, "spearman", seed=seed)) for name, values in predictors.items()]
    lines.append(Agreement("N alone (control)", "R-hat", correlate(items, r_hat, "spearman", seed=seed)))
    given_size = partial_correlation(spearman(r, r_hat), spearman(r, items), spearman(r_hat, items))
    return lines, float(given_size)


def similarity_agreement(
    overlap: OverlapMatrix, sizes: Mapping[str, int], scores: ScoreTable, control: str | None = None, *, seed: int = 0
) -> list[Agreement]:
    """Pearson and Spearman over pairs: overlap_min with the similarity of scores, direct and given a control.

    Beside it the size-matched overlap_min, and as the control the ratio of the smaller to the larger size. Benchmarks
    without scores, and the control itself in the partial lines, are left out.
    """
    lines: list[Agreement] = []
    for partialled in [None] if control is None else [None, control]:
        names = [name for name in overlap.names if name in scores.benchmarks and name != partialled]
        if len(names) < MIN_BENCHMARKS:
            raise UserValueError(f"similarity needs {MIN_BENCHMARKS} benchmarks with scores, got {len(names)}.")
        chosen = np.ix_(*[[overlap.names.index(name) for name in names]] * 2)
        performance = scores.similarity(names, partialled)
        counts = np.asarray([sizes[name] for name in names], dtype=np.float64)
        target = "performance" if partialled is None else f"performance given {partialled}"
        predictors = {
            "overlap_min": overlap.values("overlap_min")[chosen],
            "overlap_min, size-matched": overlap.values("overlap_min", matched=True)[chosen],
            "ratio of sizes (control)": np.minimum.outer(counts, counts) / np.maximum.outer(counts, counts),
        }
        for name, values in predictors.items():
            lines += [
                Agreement(name, target, correlate(values, performance, kind, seed=seed)) for kind in get_args(Kind)
            ]
    return lines


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r; NaN where a side is constant."""
    a, b = (np.asarray(side, dtype=np.float64) for side in (x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else math.nan


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r of the ranks, ties sharing their mean rank."""
    return pearson(rankdata(x), rankdata(y))


def correlate(
    x: ArrayLike, y: ArrayLike, kind: Kind, *, resamples: int = 1000, permutations: int = 10_000, seed: int = 0
) -> Correlation:
    """Correlate two numbers per benchmark `[B]`, or two symmetric matrices `[B, B]` over the pairs of benchmarks."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    count = len(a)
    if a.shape not in ((count,), (count, count)) or b.shape != a.shape:
        raise UserValueError(f"expected two arrays of one shape, [B] or [B, B], got {a.shape} and {b.shape}.")
    if count < MIN_BENCHMARKS:
        raise UserValueError(f"a correlation over benchmarks needs at least {MIN_BENCHMARKS} of them, got {count}.")
    paired = a.ndim == 2
    rows, columns = np.triu_indices(count, 1)
    place = np.zeros((count, count), dtype=np.int64)  # of a pair among those above the diagonal
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    sides = (a[rows, columns], b[rows, columns]) if paired else (a, b)
    if not all(np.isfinite(side).all() for side in sides):
        raise UserValueError("correlations need finite numbers for every benchmark.")
    coefficient = pearson if kind == "pearson" else spearman
    value = coefficient(*sides)
    generator = np.random.default_rng(seed)
    extra = math.factorial(count) > permutations  # otherwise the observed order is among them
    if extra:
        orders = np.array([generator.permutation(count) for _ in range(permutations)])
    else:
        orders = np.array(list(itertools.permutations(range(count))))
    # A relabeling moves values and does not change them: ranks are moved along.
    first, second = (side - side.mean() for side in (sides if kind == "pearson" else map(rankdata, sides)))
    limit = math.sqrt(float(first @ first) * float(second @ second)) * (abs(value) - _ROUNDING)
    as_far = 0
    for part in np.array_split(orders, max(1, len(orders) // _ORDERS_AT_ONCE)):
        relabeled = second[place[part[:, rows], part[:, columns]] if paired else part]
        as_far += int(np.count_nonzero(np.abs(relabeled @ first) >= limit))
    p = (as_far + extra) / (len(orders) + extra) if math.isfinite(value) else math.nan
    drawn = []
    for draw in generator.integers(count, size=(resamples, count)):
        if len(set(draw.tolist())) > 2:  # two benchmarks correlate perfectly
            pairs = draw[rows] != draw[columns]
            chosen = (draw[rows][pairs], draw[columns][pairs]) if paired else draw
            drawn.append(coefficient(a[chosen], b[chosen]))
    known = np.array(drawn)[np.isfinite(drawn)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return Correlation(kind, value, float(low), float(high), p, count, len(sides[0]))
