"""The tables of the study `sasft`, from the scores of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real.fine_tuning.arms import ARMS, ARMS_OF, BEFORE, SETTINGS, Setting, title_of
from benchmarks.real.page import shown
from qscope_posttrain.intervals import Interval, bootstrap_of_sums
from qscope_posttrain.report.tables import Table

COST = 1.0
"""Per cent of perplexity that a chosen weight may cost on validation rows"""
Scores = Mapping[str, Sequence[Mapping[str, Any]]]
"""{part: rows}, as `parts.score` makes them"""
Key = tuple[str, str, float, int]
"""Setting, arm, weight, seed"""


def summary(
    found: Mapping[Key, Scores],
    took: Mapping[str, Mapping[str, Any]],
    sampled: Mapping[Key, Mapping[str, Any]],
    logs: Mapping[Key, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """The tables of what was run, the sums behind them, and what the steps took."""
    tables = {}
    for pair in dict.fromkeys(key[0] for key in found):
        tables[f"{pair}_levels"] = levels(found, pair)
        tables[f"{pair}_methods"] = methods(found, pair)
        tables[f"{pair}_weights"] = weights(found, pair, logs)
        if own := {key: result for key, result in sampled.items() if key[0] == pair}:
            tables[f"{pair}_sampled"] = answers(own, pair)
    kept = {
        "-".join(map(str, key)): {part: column_sums(scores, part).round(5).tolist() for part in scores}
        for key, scores in found.items()
    }
    spent = ("seconds", "processor_seconds", "peak_mib")
    return {
        "tables": {name: table.to_dict() for name, table in tables.items()},
        "columns": list(COLUMNS),
        "sums": kept,
        "steps": {name: {key: step[key] for key in spent} for name, step in took.items()},
        # In place of those of the study itself, in whose last run most steps were done before
        **{key: (max if key == "peak_mib" else sum)(step[key] for step in took.values()) for key in spent},
    }


COLUMNS = ("mass", "kept", "loss", "tokens", "switches")
"""Sums of a row over its completion: P(target), log(1 - P(target)), -log P(token), tokens, and the probability that at
least one token of the target is drawn"""


def matrix(scores: Scores, part: str, kind: str) -> NDArray[np.float64]:
    """[rows, COLUMNS] of the rows of a kind: a language, or "switched"."""
    rows = [row for row in scores[part] if (row["switched"] if kind == "switched" else not row["switched"])]
    rows = [row for row in rows if kind == "switched" or row["language"] == kind]
    found = np.array([[row[name] for name in COLUMNS[:4]] for row in rows], dtype=np.float64)
    return np.column_stack([found, -np.expm1(found[:, 1])])


def sources(scores: Scores, pair: Setting, part: str) -> NDArray[np.float64]:
    """`matrix` of the clean rows in languages other than the target."""
    return np.concatenate([matrix(scores, part, language) for language in pair.sources])


def column_sums(scores: Scores, part: str) -> NDArray[np.float64]:
    kinds = [*dict.fromkeys(row["language"] for row in scores[part]), "switched"]
    return np.array([matrix(scores, part, kind).sum(axis=0) for kind in kinds])


def changes(one: Sequence[Scores], other: Sequence[Scores], name: str, part: str) -> dict[str, Interval]:
    """Changes in per cent from `other` to `one`, runs of the same seeds, with paired bootstrap intervals over rows."""
    pair = SETTINGS[name]

    def both(columns: Any) -> NDArray[np.float64]:
        return np.column_stack([sum(columns(scores) for scores in runs) for runs in (one, other)])

    def ratio(columns: Any) -> Interval:
        return bootstrap_of_sums(both(columns), lambda sums: 100 * (sums[..., 0] / sums[..., 1] - 1))

    def perplexity(columns: Any, tokens: NDArray[np.float64]) -> Interval:
        rows = np.column_stack([both(columns), tokens * len(one)])
        return bootstrap_of_sums(rows, lambda sums: 100 * np.expm1((sums[..., 0] - sums[..., 1]) / sums[..., 2]))

    masked = 1 if pair.measure == "hazard" else 0
    clean, target, switches = (
        (lambda scores: sources(scores, pair, part)),
        (lambda scores: matrix(scores, part, pair.target)),
        (lambda scores: matrix(scores, part, "switched")),
    )
    return {
        "hazard": ratio(lambda scores: clean(scores)[:, 0]),
        "switches": ratio(lambda scores: clean(scores)[:, 4]),
        "entry": perplexity(lambda scores: -switches(scores)[:, 2], np.ones(len(switches(one[0])))),
        "cost": perplexity(lambda scores: clean(scores)[:, 2] + masked * clean(scores)[:, 1], clean(one[0])[:, 3]),
        "target": perplexity(lambda scores: target(scores)[:, 2], target(one[0])[:, 3]),
    }


def against_sft(found: Mapping[Key, Scores], pair: str, arm: str, weight: float, part: str) -> dict[str, Interval]:
    """`changes` of one weight of an arm from plain training, both with seed 0."""
    return changes([found[pair, arm, weight, 0]], [found[pair, "sft", 0.0, 0]], pair, part)


def chosen(found: Mapping[Key, Scores], pair: str, arm: str) -> float:
    """The weight with the lowest hazard on validation rows, seed 0, of those that cost at most COST; where none does,
    the cheapest."""
    if arm == BEFORE:
        return 0.0
    if len(ARMS[arm].weights) == 1:
        return ARMS[arm].weights[0]
    tried = {
        weight: against_sft(found, pair, arm, weight, "validation")
        for weight in ARMS[arm].weights
        if (pair, arm, weight, 0) in found
    }
    cheap = {weight: change for weight, change in tried.items() if change["cost"].estimate <= COST}
    if not cheap:
        return min(tried, key=lambda weight: tried[weight]["cost"].estimate)
    return min(cheap, key=lambda weight: cheap[weight][SETTINGS[pair].measure].estimate)


def methods(found: Mapping[Key, Scores], pair: str) -> Table:
    """Every arm with its chosen weight against SFT, on test rows."""
    rows = []
    columns_of = [*dict.fromkeys((SETTINGS[pair].measure, "hazard")), "cost", "target"]
    for arm in (BEFORE, *(arm for arm in ARMS_OF[pair] if arm != "sft")):
        if not any(key[:2] == (pair, arm) for key in found):
            continue
        weight = chosen(found, pair, arm)
        seeds = [key[3] for key in found if key[:3] == (pair, arm, weight)]
        against = [found[pair, "sft", 0.0, seed] for seed in seeds]
        change = changes([found[pair, arm, weight, seed] for seed in seeds], against, pair, "test")
        single = [
            changes([found[pair, arm, weight, seed]], [found[pair, "sft", 0.0, seed]], pair, "test")[
                SETTINGS[pair].measure
            ]
            for seed in seeds
        ]
        cells = [shown(change[key], "+.1f") for key in columns_of]
        each = " ".join(f"{value.estimate:+.1f}" for value in single)
        dear = bool(weight) and against_sft(found, pair, arm, weight, "validation")["cost"].estimate > COST
        rows.append([title_of(arm), f"{weight:g}{' (!)' if dear else ''}" if weight else None, *cells, each])
    names = {"cost": "perplexity", "target": f"perplexity of {SETTINGS[pair].target}"}
    columns = ["method", "weight", *(f"{names.get(key, key)}, %" for key in columns_of)]
    columns.append(f"{SETTINGS[pair].measure} by seed, %")
    first = found[pair, "sft", 0.0, 0]
    count = len(sources(first, SETTINGS[pair], "test"))
    caption = (
        f"Changes against SFT of the same seed on {count} held-out texts; paired 95 % bootstrap intervals over texts, "
        "after summing over seeds. They do not hold what another seed would change, which the last column shows. "
        f"(!): more than {COST:g} % of perplexity on validation texts."
    )
    return Table(f"{SETTINGS[pair].title}: methods against SFT", columns, rows, caption)


def weights(found: Mapping[Key, Scores], pair: str, logs: Mapping[Key, Sequence[Mapping[str, Any]]]) -> Table:
    """Every weight that was tried, with seed 0, and how far its penalty fell."""
    rows = []
    for arm in ARMS_OF[pair]:
        for weight in ARMS[arm].weights:
            if arm == "sft" or not ARMS[arm].weight or (pair, arm, weight, 0) not in found:
                continue
            row: list[Any] = [ARMS[arm].title, weight]
            for part in ("validation", "test"):
                change = against_sft(found, pair, arm, weight, part)
                row += [shown(change[key], "+.1f") for key in (SETTINGS[pair].measure, "cost")]
            fell = [value for entry in logs.get((pair, arm, weight, 0), ()) for name, value in entry.items()
                    if name.endswith("/penalty")]  # fmt: skip
            row.append(f"{fell[0]:.3g}, {fell[-1]:.3g}" if fell else None)
            rows.append([*row, "chosen" if weight == chosen(found, pair, arm) else None])
    key = SETTINGS[pair].measure
    columns = [
        "method",
        "weight",
        f"{key}, validation, %",
        "perplexity, validation, %",
        f"{key}, %",
        "perplexity, %",
        "penalty, first and last",
        "",
    ]
    caption = (
        "The first weight of SASFT and of the token penalty is the package's default, that of the paper's form the "
        "published one. penalty: as it was logged in the first and last six updates, for features in standard "
        "deviations of the readout, in the paper's form raw."
    )
    return Table(f"{SETTINGS[pair].title}: weights, seed 0", columns, rows, caption)


def levels(found: Mapping[Key, Scores], pair: str) -> Table:
    """What the models do, before SFT and after, with the chosen weights: the hazard by language, and perplexities."""
    own = SETTINGS[pair]
    rows = []
    for arm in (BEFORE, *ARMS_OF[pair]):
        if not any(key[:2] == (pair, arm) for key in found):
            continue
        scores = found[pair, arm, chosen(found, pair, arm), 0]
        whole, target = sources(scores, own, "test"), matrix(scores, "test", own.target)
        hazards = [1000 * _mean(matrix(scores, "test", language), 0, 3) for language in own.sources]
        drawn = bootstrap_of_sums(
            np.column_stack([whole[:, 4], np.ones(len(whole))]), lambda sums: 100 * sums[..., 0] / sums[..., 1]
        )
        perplexities = [f"{np.exp(_mean(part, 2, 3)):.2f}" for part in (whole, target)]
        rows.append(
            [
                title_of(arm),
                f"{1000 * _mean(whole, 0, 3):.2f}",
                *(f"{value:.2f}" for value in hazards),
                shown(drawn),
                *perplexities,
            ]
        )
    columns = [
        "model",
        "hazard, 1e-3",
        *own.sources,
        "expected switches, %",
        "perplexity",
        f"perplexity of {SETTINGS[pair].target}",
    ]
    caption = (
        "hazard: mean probability of a token of the target at a token of held-out text; expected switches: share "
        "of its responses in which at least one would be drawn, with a 95 % bootstrap interval over texts. Seed 0."
    )
    return Table(f"{own.title}: before and after SFT", columns, rows, caption)


def answers(sampled: Mapping[Key, Mapping[str, Any]], pair: str) -> Table:
    """What was sampled: the share of responses that switch."""
    rows = []
    for (_, arm, weight, _), result in sampled.items():
        asked = [language["samples"] for language in result["languages"].values()]
        rows.append([title_of(arm), weight or None, sum(asked), shown(Interval(**result["micro"]), unit=100)])
    caption = (
        "`qscope evaluate code-switching`, temperature 1, 48 tokens; 95 % bootstrap intervals over prompts, seed 0."
    )
    return Table(
        f"{SETTINGS[pair].title}: sampled responses", ["method", "weight", "responses", "switched, %"], rows, caption
    )


def _mean(rows: NDArray[np.float64], column: int, of: int) -> float:
    return float(rows[:, column].sum() / rows[:, of].sum())
