"""How far a synthesis got: its coverage in groups of features, next to its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.explanation import FeatureId
from qscope_posttrain.report.plots import Curve, line_curves
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.synthesis.comparison import Corpus, comparison_tables
from qscope_posttrain.synthesis.coverage import Hits, coverage_interval, firing, growth, reached_features
from qscope_posttrain.synthesis.pipeline import SynthesisRun
from qscope_posttrain.synthesis.prompts import Draft
from qscope_posttrain.synthesis.reading import FeatureReader

MADE_FOR = "targets made for"
HELD_OUT = "targets held out"


@dataclass(frozen=True)
class Measured:
    """Coverage tables, and the curves of its growth."""

    tables: tuple[Table, ...]
    figure: str
    """SVG"""


def measure(
    run: SynthesisRun,
    made_for: Sequence[FeatureId],
    held_out: Sequence[FeatureId],
    reader: FeatureReader,
    *,
    random_drafts: Sequence[Draft] | None = None,
    random_requests: int = 0,
    natural: Sequence[str] = (),
    other_layers: Sequence[int] = (),
    min_texts: int = 2,
    seed: int = 0,
) -> Measured:
    """Read everything once more, with all layers, and compare.

    Args:
        made_for: targets that prompts were verified on: the filter's own.
        held_out: targets of the same judge that nothing was made for.
        random_drafts: of `pipeline.random_synthesis`.
        natural: texts of people, in random order. Half of them only say which features of `other_layers` are counted;
            the others are what natural sampling draws from.
        other_layers: layers that no prompt was verified on; counted are the features that fire on at least `min_texts`
            of the former half.

    Raises:
        ValueError: nothing was written, or other layers without natural texts.
    """
    if not run.drafts:
        raise UserValueError("no prompt was written, so there is nothing to measure.")
    if other_layers and len(natural) < 2:
        raise UserValueError("features of other layers are found on natural texts; give some.")
    reference, pool = list(natural[::2]), list(natural[1::2])
    groups: dict[str, Sequence[FeatureId]] = {MADE_FOR: made_for, HELD_OUT: held_out}
    if other_layers:
        read = reader.read(reference, other_layers)
        groups |= {f"layer {layer}": reached_features(read[layer], layer, min_texts) for layer in other_layers}
    groups = {name: features for name, features in groups.items() if features}
    made = _corpus("feature-driven", run.drafts, run.drawn, reader, groups)
    others = []
    if random_drafts:
        others.append(_corpus("random synthesis", random_drafts, random_requests, reader, groups))
    if pool:
        others.append(Corpus("natural text", _hits(reader, pool, groups)))
    kept = kept_places(run)
    curves = [made, *others]
    return Measured(
        tuple(comparison_tables(made, kept, others, seed=seed)) if kept else (),
        _figure(curves, HELD_OUT if HELD_OUT in groups else MADE_FOR, run.drawn, seed),
    )


def target_table(targets: Sequence[FeatureId], seed_hits: Hits, made_hits: Hits) -> Table:
    """Cov(D) of equation 23 over all targets, of the seed data and with the new examples added."""
    both = np.concatenate([seed_hits, made_hits])
    rows: list[list[Cell]] = []
    for name, hits in (("seed data", seed_hits), ("seed data and new examples", both)):
        interval = coverage_interval(hits)
        rows.append([name, len(hits), int(hits.any(axis=0).sum()), len(targets), interval.estimate])
    return Table(
        "Coverage of all targets",
        ["data", "examples", "targets reached", "targets", "coverage"],
        rows,
        "Equation 23, over made-for and held-out targets together.",
    )


def kept_places(run: SynthesisRun) -> list[int]:
    """Places among the drafts of those that became examples."""
    places = {id(draft): place for place, draft in enumerate(run.drafts)}
    return [places[id(example.draft)] for example in run.examples]


def _corpus(
    name: str,
    drafts: Sequence[Draft],
    requests: int,
    reader: FeatureReader,
    groups: Mapping[str, Sequence[FeatureId]],
) -> Corpus:
    hits = _hits(reader, [draft.text for draft in drafts], groups)
    return Corpus(name, hits, requests, sum(draft.tokens for draft in drafts))


def _hits(reader: FeatureReader, texts: Sequence[str], groups: Mapping[str, Sequence[FeatureId]]) -> dict[str, Hits]:
    layers = sorted({feature.layer for features in groups.values() for feature in features})
    read = reader.read(texts, layers)
    return {name: firing(read, features) for name, features in groups.items()}


def _figure(corpora: Sequence[Corpus], group: str, longest: int, seed: int) -> str:
    """Coverage of one group over the number of prompts, each corpus in a random order."""
    curves = []
    for corpus in corpora:
        order = np.random.default_rng(seed).permutation(len(corpus))[: max(longest, 1)]
        found = growth(corpus.hits[group][order])
        curves.append(Curve(corpus.name, list(range(1, len(found) + 1)), found))
    return line_curves(curves, "prompts", f"coverage of {group}", percent=True)
