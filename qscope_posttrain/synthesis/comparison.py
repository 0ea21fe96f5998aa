"""Coverage of what was synthesised next to random synthesis and natural text, at equal requests and equal examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qscope_posttrain.intervals import Interval
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.synthesis.coverage import Hits, coverage_interval, coverage_of_subsets


@dataclass(frozen=True)
class Corpus:
    """The texts of one strategy, as the features that they fire."""

    name: str
    hits: Mapping[str, Hits]
    """{group of features: [texts, features]}, all groups on the same texts"""
    requests: int | None = None
    """Prompts that were asked for to make them; None for natural text"""
    tokens: int | None = None
    """Of these requests and their answers"""

    def __len__(self) -> int:
        return len(next(iter(self.hits.values())))


def comparison_tables(
    made: Corpus, kept: Sequence[int], others: Sequence[Corpus], draws: int = 200, seed: int = 0
) -> list[Table]:
    """Two tables: all corpora at the requests spent, and at as many examples as were kept.

    Args:
        made: every prompt that was written for a feature.
        kept: places in it of those that became examples.
        others: what it is compared with.
    """
    selected = Corpus(f"{made.name}, verified", _rows(made.hits, kept), made.requests, made.tokens)
    everything = Corpus(f"{made.name}, unfiltered", made.hits, made.requests, made.tokens)
    return [
        equal_requests([selected, everything, *others], draws, seed),
        equal_examples(selected, [everything, *others], draws, seed),
    ]


def equal_requests(corpora: Sequence[Corpus], draws: int, seed: int) -> Table:
    """What each strategy reaches with the requests of the first; natural text counts one request a text."""
    budget = corpora[0].requests or 0
    rows: list[list[Cell]] = []
    for corpus in corpora:
        size = len(corpus) if corpus.requests is not None else min(budget, len(corpus))
        cells: list[Cell] = [corpus.name, corpus.requests, corpus.tokens, size]
        for hits in corpus.hits.values():
            if corpus.requests is None and 0 < size < len(corpus):
                cells.append(_drawn(coverage_of_subsets(hits, size, draws, seed)))
            else:
                cells.append(_measured(coverage_interval(hits)))
        rows.append(cells)
    return Table(
        "Coverage at equal requests",
        ["strategy", "prompt requests", "tokens", "examples", *corpora[0].hits],
        rows,
        "Requests and tokens: of prompts; a response costs the same whatever the strategy. Coverage: share of features "
        "that at least one example fires. [ ]: Wilson interval over the features of the group. ( ): range of 95 % of "
        "random draws of so many texts. The verified examples were chosen by the very features of the first group: "
        "there, coverage is high by construction, and only the other groups are evidence.",
    )


def equal_examples(first: Corpus, others: Sequence[Corpus], draws: int, seed: int) -> Table:
    """What as many examples of each corpus reach as the first one has."""
    size = len(first)
    rows: list[list[Cell]] = [[first.name, size, *(_measured(coverage_interval(hits)) for hits in first.hits.values())]]
    for corpus in others:
        most = min(size, len(corpus))
        cells: list[Cell] = [corpus.name, most]
        cells += [_drawn(coverage_of_subsets(h, most, draws, seed)) if most else None for h in corpus.hits.values()]
        rows.append(cells)
    return Table(
        "Coverage at equal examples",
        ["strategy", "examples", *first.hits],
        rows,
        "As above; every other strategy by random draws of as many of its texts as were verified, where it has them.",
    )


def _rows(hits: Mapping[str, Hits], kept: Sequence[int]) -> dict[str, Hits]:
    places = np.asarray(kept, dtype=np.int64)
    return {name: matrix[places] for name, matrix in hits.items()}


def _measured(interval: Interval) -> str:
    return f"{interval.estimate:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def _drawn(interval: Interval) -> str:
    return f"{interval.estimate:.1%} ({interval.low:.1%}, {interval.high:.1%})"
