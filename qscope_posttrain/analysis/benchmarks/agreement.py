"""Do features and performance agree on which benchmarks are redundant and alike? With size alone as the control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qscope_posttrain.analysis.benchmarks.correlation import (
    FEWEST_BENCHMARKS,
    Correlation,
    Kind,
    correlate,
    correlate_pairs,
    partial_correlation,
    spearman,
)
from qscope_posttrain.analysis.benchmarks.overlap import OverlapMatrix
from qscope_posttrain.analysis.benchmarks.performance import PerformanceRedundancy, ScoreTable
from qscope_posttrain.analysis.benchmarks.redundancy import Redundancy
from qscope_posttrain.errors import UserValueError


@dataclass(frozen=True)
class Agreement:
    """One line: how a number from features, or from sizes, goes with one from performance."""

    predictor: str
    target: str
    correlation: Correlation

    def to_dict(self) -> dict[str, Any]:
        return {"predictor": self.predictor, "target": self.target, **asdict(self.correlation)}


def redundancy_agreement(
    features: Sequence[Redundancy], performance: Mapping[str, PerformanceRedundancy], *, seed: int = 0
) -> tuple[list[Agreement], float]:
    """Spearman over benchmarks of R with R-hat, with the size-matched R-hat, and with N alone; and the partial rank
    correlation of R and R-hat given N (Eq. 12 on ranks).

    Raises:
        ValueError: fewer than four benchmarks have both.
    """
    both = [found for found in features if found.name in performance]
    if len(both) < FEWEST_BENCHMARKS:
        raise UserValueError(f"R and R-hat need {FEWEST_BENCHMARKS} benchmarks with both, got {len(both)}.")
    r = [performance[found.name].r for found in both]
    r_hat = [found.r_hat.estimate for found in both]
    items = [float(found.items) for found in both]
    predictors = {
        "R-hat": r_hat,
        "R-hat, size-matched": [found.r_hat_matched.estimate for found in both],
        "N alone (control)": items,
    }
    lines = [Agreement(name, "R", correlate(values, r, "spearman", seed=seed)) for name, values in predictors.items()]
    lines.append(Agreement("N alone (control)", "R-hat", correlate(items, r_hat, "spearman", seed=seed)))
    given_size = partial_correlation(spearman(r, r_hat), spearman(r, items), spearman(r_hat, items))
    return lines, float(given_size)


def similarity_agreement(
    overlap: OverlapMatrix,
    sizes: Mapping[str, int],
    scores: ScoreTable,
    control: str | None = None,
    *,
    seed: int = 0,
) -> list[Agreement]:
    """Pearson and Spearman over pairs: overlap_min with the similarity of scores, direct and given a control.

    Beside it the size-matched overlap_min, and as the control the ratio of the smaller to the larger size. Benchmarks
    without scores, and the control itself in the partial lines, are left out.

    Raises:
        ValueError: fewer than four benchmarks have scores.
    """
    lines: list[Agreement] = []
    for partialled in [None] if control is None else [None, control]:
        names = [name for name in overlap.names if name in scores.benchmarks and name != partialled]
        if len(names) < FEWEST_BENCHMARKS:
            raise UserValueError(f"similarity needs {FEWEST_BENCHMARKS} benchmarks with scores, got {len(names)}.")
        chosen = np.ix_(*[[overlap.names.index(name) for name in names]] * 2)
        performance = scores.similarity(names, partialled)
        target = "performance" if partialled is None else f"performance given {partialled}"
        predictors = {
            "overlap_min": overlap.values("overlap_min")[chosen],
            "overlap_min, size-matched": overlap.values("overlap_min", matched=True)[chosen],
            "ratio of sizes (control)": _size_ratio([sizes[name] for name in names]),
        }
        kinds: tuple[Kind, ...] = ("pearson", "spearman")
        lines += [
            Agreement(name, target, correlate_pairs(values, performance, kind, seed=seed))
            for name, values in predictors.items()
            for kind in kinds
        ]
    return lines


def _size_ratio(sizes: Sequence[int]) -> NDArray[np.float64]:
    """[B, B] the smaller size over the larger one."""
    counts = np.asarray(sizes, dtype=np.float64)
    return np.minimum.outer(counts, counts) / np.maximum.outer(counts, counts)
