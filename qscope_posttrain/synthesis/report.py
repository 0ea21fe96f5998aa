"""Report a synthesis: its data as TRL reads them, and coverage of groups of features, next to random synthesis and
natural text."""

from __future__ import annotations

import json
import os
import random
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qscope_posttrain.errors import UserValueError, library_refusals
from qscope_posttrain.features.explain.explanation import FeatureId
from qscope_posttrain.report.plots import Curve, line_curves
from qscope_posttrain.report.summary import write_text
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.synthesis.coverage import (
    FeatureReader,
    Hits,
    coverage_interval,
    coverage_of_subsets,
    firing,
    growth,
    reached_features,
)
from qscope_posttrain.synthesis.pipeline import Draft, SynthesisExample, SynthesisRun

if TYPE_CHECKING:
    from datasets import Dataset


MADE_FOR = "targets made for"
HELD_OUT = "targets held out"


@dataclass(frozen=True)
class StrategyTexts:
    """The texts of one strategy, as the features that they fire."""

    name: str
    hits: Mapping[str, Hits]  # {group of features: [texts, features]}, all groups on the same texts
    requests: int | None = None  # Number of prompts asked for to make them; None for natural text
    tokens: int | None = None  # Tokens of these requests and their answers

    def __len__(self) -> int:
        return len(next(iter(self.hits.values())))


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
) -> tuple[list[Table], str]:
    """Read everything once more, with all layers, and compare: tables of coverage, and its growth as an SVG.

    Args:
        made_for: Targets that prompts were verified on: the filter's own.
        held_out: Targets of the same judge that nothing was made for.
        random_drafts: Result of `pipeline.Synthesis.random`, for which `random_requests` prompts were asked for.
        natural: Texts by people, in random order. Half of them only decide which features of `other_layers`, on which
            no prompt was verified, are counted: those that fire on at least `min_texts`. The others are sampled from.
    """
    if not run.drafts:
        raise UserValueError("no prompt was written, so there is nothing to measure.")
    if other_layers and len(natural) < 2:
        raise UserValueError("features of other layers are found on natural texts; give some.")
    reference, pool = list(natural[::2]), list(natural[1::2])
    groups: dict[str, Sequence[FeatureId]] = {MADE_FOR: made_for, HELD_OUT: held_out}
    if other_layers:
        read = reader.features(reference, layers=other_layers)
        groups |= {f"layer {layer}": reached_features(read[layer], layer, min_texts) for layer in other_layers}
    groups = {name: features for name, features in groups.items() if features}
    layers = sorted({feature.layer for features in groups.values() for feature in features})

    def hits(texts: Sequence[str]) -> dict[str, Hits]:
        read = reader.features(texts, layers=layers)
        return {name: firing(read, features) for name, features in groups.items()}

    def written(name: str, drafts: Sequence[Draft], requests: int) -> StrategyTexts:
        tokens = sum(draft.tokens for draft in drafts)
        return StrategyTexts(name, hits([draft.text for draft in drafts]), requests, tokens)

    made, others = written("feature-driven", run.drafts, run.drawn), []
    if random_drafts:
        others.append(written("random synthesis", random_drafts, random_requests))
    if pool:
        others.append(StrategyTexts("natural text", hits(pool)))
    places = {id(draft): place for place, draft in enumerate(run.drafts)}
    kept = [places[id(example.draft)] for example in run.examples]
    figure = _figure([made, *others], HELD_OUT if HELD_OUT in groups else MADE_FOR, run.drawn, seed)
    return ([comparison_table(made, kept, others, seed=seed)] if kept else []), figure


def comparison_table(
    made: StrategyTexts, kept: Sequence[int], others: Sequence[StrategyTexts], draws: int = 200, seed: int = 0
) -> Table:
    """Coverage of each strategy with the requests of the first; natural text counts one request per text. `kept` are
    the places in `made`, every prompt that was written for a feature, of those that became examples."""
    places = np.asarray(kept, dtype=np.int64)
    verified = {name: matrix[places] for name, matrix in made.hits.items()}
    rows: list[list[Cell]] = []
    for texts in (
        replace(made, name=f"{made.name}, verified", hits=verified),
        replace(made, name=f"{made.name}, unfiltered"),
        *others,
    ):
        size = len(texts) if texts.requests is not None else min(made.requests or 0, len(texts))
        cells: list[Cell] = [texts.name, texts.requests, texts.tokens, size]
        for hits in texts.hits.values():
            if texts.requests is None and 0 < size < len(texts):
                drawn = coverage_of_subsets(hits, size, draws, seed)
                cells.append(f"{drawn.estimate:.1%} ({drawn.low:.1%}, {drawn.high:.1%})")
            else:
                cells.append(coverage_interval(hits).text(".1%"))
        rows.append(cells)
    return Table(
        "Coverage at equal requests",
        ["strategy", "prompt requests", "tokens", "examples", *made.hits],
        rows,
        "Requests and tokens: of prompts; a response costs the same whatever the strategy. Coverage: share of features "
        "that at least one example fires. [ ]: Wilson interval over the features of the group. ( ): range of 95 % of "
        "random draws of that number of texts. The verified examples were chosen by the very features of the first "
        "group: there, coverage is high by construction, and only the other groups are evidence.",
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


def _figure(strategies: Sequence[StrategyTexts], group: str, longest: int, seed: int) -> str:
    """Coverage of one group over the number of prompts, each strategy in a random order."""
    curves = []
    for texts in strategies:
        order = np.random.default_rng(seed).permutation(len(texts))[: max(longest, 1)]
        found = growth(texts.hits[group][order])
        curves.append(Curve(texts.name, list(range(1, len(found) + 1)), found))
    return line_curves(curves, "prompts", f"coverage of {group}", percent=True)


def write_prompts(path: Path, made: SynthesisRun, control: Sequence[Draft]) -> None:
    """Write every prompt, what it was for, and whether it was kept, as JSONL."""
    activation = {id(example.draft): example.activation for example in made.examples}
    names = ("strategy", "prompt", "layer", "feature", "kind", "prompt_type", "style", "request", "kept", "activation")
    lines = []
    for strategy, drafts in (("feature-driven", made.drafts), ("random", control)):
        for draft in drafts:
            asked = (*(draft.feature or (None, None)), draft.kind, draft.prompt_type, draft.style, draft.request_id)
            entry = (strategy, draft.text, *asked, id(draft) in activation, activation.get(id(draft)))
            lines.append(json.dumps(dict(zip(names, entry, strict=True)), ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def examples_table(rows: Sequence[Mapping[str, Any]], made: SynthesisRun) -> Table:
    """Counts of examples by type, with what became of the prompts."""
    cells: list[list[Cell]] = [[name, count] for name, count in type_counts(rows).items()]
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(made.rejected.items()))
    features = len({(row["layer"], row["feature"]) for row in rows})
    caption = (
        f"{len(rows)} examples for {features} features, from {made.drawn} prompts asked for; {len(made.without)} "
        f"features that no prompt fired; {made.undecided} verified prompts without a kind or a whole response"
        f"{f' ({reasons})' if reasons else ''}."
    )
    return Table("Examples", ["type", "examples"], cells, caption)


TYPES = tuple(f"{prompt_type} {kind}" for prompt_type in ("vanilla", "adversarial") for kind in ("harmful", "benign"))


def example_row(example: SynthesisExample, relevance: Mapping[FeatureId, float]) -> dict[str, Any]:
    """One row: `prompt` and `completion` in TRL's conversational form, and its provenance."""
    draft, response = example.draft, example.response
    if draft.explanation is None:
        raise UserValueError("only prompts that were written for a feature become rows.")
    feature = draft.explanation.feature
    return {
        "prompt": [{"role": "user", "content": draft.text}],
        "completion": [{"role": "assistant", "content": response.text}],
        "layer": feature.layer,
        "feature": feature.feature_id,
        "explanation": draft.explanation.text,
        "relevance": float(relevance[feature]),
        "activation": example.activation,
        "prompt_type": draft.prompt_type,
        "style": draft.style,
        "asked_kind": draft.kind,
        "kind": response.kind,
        "prompt_request": draft.request_id,
        "response_request": response.request_id,
    }


def row_type(row: Mapping[str, Any]) -> str:
    """One of the four types, such as "vanilla harmful"."""
    return f"{row['prompt_type']} {row['kind']}"


def type_counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Number of rows of each of the four types."""
    found = dict.fromkeys(TYPES, 0)
    for row in rows:
        found[row_type(row)] += 1
    return found


def balanced(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> list[Mapping[str, Any]]:
    """Draw the same number of rows of each type that occurs, that of the rarest; they stay in order."""
    least = min((count for count in type_counts(rows).values() if count), default=0)
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row_type(row), []).append(place)
    draw = random.Random(seed)
    kept = sorted(place for name in sorted(places) for place in draw.sample(places[name], least))
    return [rows[place] for place in kept]


def save_rows(rows: Sequence[Mapping[str, Any]], folder: str | os.PathLike[str]) -> Dataset:
    """Write a data set for `load_from_disk` and for `dataset_name` of a recipe; it replaces an older one."""
    from datasets import Dataset

    if not rows:
        raise UserValueError("there are no rows to save: no prompt was kept and answered.")
    target = Path(folder)
    made = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    found = Dataset.from_list([dict(row) for row in rows])
    try:
        with library_refusals(f"cannot write '{target}'", OSError):
            found.save_to_disk(str(made))
        if target.exists():
            if not (target / "state.json").is_file():
                raise UserValueError(f"'{target}' is no data set and is in the way; move it, or choose another output.")
            shutil.rmtree(target)
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return found
