"""What fine-tuning did to knowledge: answers of MMLU-STEM and MGSM, scored before and after with the whole vocabulary.

    python -m benchmarks.real.fine_tuning.capability MODEL ADAPTER OUTPUT

Items and scores are those of the study `overlap`: which of four answers does the question make most likely? Chance is
a quarter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real.fine_tuning.arms import BEFORE, SETTINGS, title_of
from benchmarks.real.fine_tuning.parts import merged
from benchmarks.real.page import shown
from benchmarks.real.panel.agreement import by_group
from benchmarks.real.panel.items import Item, benchmark_sets
from benchmarks.real.panel.likelihoods import hits, probabilities, score_sets
from qscope_posttrain.intervals import bootstrap_of_sums
from qscope_posttrain.report.summary import write_text
from qscope_posttrain.report.tables import Table

ITEMS = 20
"""Of each subject of MMLU-STEM and each language of MGSM"""
KINDS = {"mmlu_": "MMLU-STEM", "mgsm_": "MGSM"}


def read_sets() -> dict[str, list[Item]]:
    return {name: found for name, found in benchmark_sets(ITEMS).items() if name.startswith(tuple(KINDS))}


def capability_table(scored: Mapping[str, Mapping[str, Any]], setting: str) -> Table:
    """Of every arm the accuracy, and how much less probable the right answer has become since before SFT (`base`)."""
    sets = read_sets()
    rows = []
    for arm, found in scored.items():
        cells = []
        for kind in KINDS:
            right = grouped(hits, found, sets, kind)
            accuracy = np.column_stack([right, np.ones(len(right))])
            cells.append(shown(bootstrap_of_sums(accuracy, lambda sums: 100 * sums[..., 0] / sums[..., 1])))
        for kind in KINDS if arm != BEFORE else ():
            both = [grouped(probabilities, scores, sets, kind) for scores in (found, scored[BEFORE])]
            pairs = np.column_stack([*both, np.ones(len(both[0]))])
            change = bootstrap_of_sums(pairs, lambda sums: 100 * (sums[..., 0] - sums[..., 1]) / sums[..., 2])
            cells.append(shown(change, "+.1f"))
        rows.append([title_of(arm), *cells, *[None] * (4 - len(cells))])
    names = list(KINDS.values())
    columns = ["method", *(f"{name}, %" for name in names), *(f"{name}, right answer, points" for name in names)]
    counts = [sum(len(found) for name, found in sets.items() if name.startswith(kind)) for kind in KINDS]
    caption = (
        f"Accuracy on {counts[0]} and {counts[1]} items (chance: 25), and the change since before SFT in the "
        "probability of the right answer among the four; 95 % bootstrap intervals over groups of four items. Seed 0."
    )
    return Table(f"{SETTINGS[setting].title}: questions before and after", columns, rows, caption)


def grouped(measure: Any, scores: Mapping[str, Any], sets: Mapping[str, Sequence[Item]], kind: str) -> NDArray[Any]:
    """[groups]: the mean of a measure over the four items of every group."""
    values = [by_group(measure(scores[name], [item.right for item in found])) for name, found in sets.items()
              if name.startswith(kind)]  # fmt: skip
    return np.concatenate(values)


def main(arguments: Sequence[str] | None = None) -> int:
    model, adapter, output = sys.argv[1:] if arguments is None else arguments
    found = score_sets(*merged(model, adapter), read_sets())
    write_text(Path(output), json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
