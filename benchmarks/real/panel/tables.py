"""The tables of study 6.

The report's form, the last token of the question, in the middle layer was chosen beforehand. Other layers and forms stand
beside it, and tokens, lengths and the residual stream as controls. The kind of score is the one that ranks the models
most reliably, whatever features say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.classifier import spread
from benchmarks.real.panel.agreement import (
    SCORES,
    Array,
    by_group,
    cosines,
    given_pairs,
    leave_two_out,
    random_sizes,
    ranking_reliability,
    similarity_reliability,
)
from benchmarks.real.panel.features import FORMS, by_benchmark
from benchmarks.real.panel.items import Item
from benchmarks.real.panel.likelihoods import hits
from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures
from qscope_posttrain.analysis.benchmarks.overlap import measure_overlap
from qscope_posttrain.analysis.benchmarks.performance import Correlation, ScoreTable, correlate, performance_redundancy
from qscope_posttrain.analysis.benchmarks.redundancy import measure_redundancy
from qscope_posttrain.report.tables import Table

CONTROL = "mmlu_others"
"""Partialled out, as the report does with MMLU: subjects that are in no other set"""
OTHER_LANGUAGES = ("gaokao_math_qa", "mgsm_fr", "mgsm_ru", "mgsm_zh")
CHANCE = 0.25


@dataclass(frozen=True, eq=False)
class Panel:
    """Scores of every item by every model."""

    models: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Array]]
    """{kind of score: {benchmark: [items, models]}}"""
    own: Mapping[str, Mapping[str, Array]]
    """{model: {benchmark: [items] right among the benchmark's own options}}"""

    def means(self, kind: str, names: Sequence[str]) -> Array:
        """[models, benchmarks]"""
        return np.stack([self.scores[kind][name].mean(axis=0) for name in names], axis=1)


def read_panel(
    files: Mapping[str, Any], sets: Mapping[str, Sequence[Item]], own: Mapping[str, Sequence[Item]]
) -> Panel:
    """From {model: what panel.py wrote}."""
    right = {name: [item.right for item in found] for name, found in sets.items() if found[0].options}
    scores = {
        kind: {
            name: np.stack([score(file["scores"][name], answers) for file in files.values()], axis=1)
            for name, answers in right.items()
        }
        for kind, score in SCORES.items()
    }
    with_own = {
        model: {name: hits(found, [item.right for item in own[name]]) for name, found in file["own_options"].items()}
        for model, file in files.items()
        if "own_options" in file
    }
    return Panel(tuple(files), scores, with_own)


def study(panel: Panel, sets: Mapping[str, Sequence[Item]], read: Mapping[str, Any],
          tokens: Mapping[str, Sequence[Sequence[int]]], layers: Sequence[int]) -> dict[str, Any]:  # fmt: skip
    """All tables, and the numbers behind them."""
    scored = list(panel.scores["accuracy"])
    reliability = {kind: {n: ranking_reliability(panel.scores[kind][n]) for n in scored} for kind in SCORES}
    kind = max(SCORES, key=lambda name: float(np.mean(list(reliability[name].values()))))
    cells: dict[str, dict[str, ItemFeatures]] = {}
    for layer in layers:
        for form in FORMS:
            of_cell = [read[f"{layer}/{form}/{what}"] for what in ("sizes", "indices", "width")]
            cells[f"layer {layer}, {form}"] = by_benchmark(sets, *of_cell)
    main = f"layer {layers[len(layers) // 2]}, last"
    width = 1 + max(token for of_set in tokens.values() for ids in of_set for token in ids)
    words = {name: ItemFeatures.from_sets(name, ids, width) for name, ids in tokens.items()}
    residual = {name: np.stack([part.mean(axis=0) for part in _split(read[_key(name)], sets)]) for name in cells}
    redundant = redundancy(panel, kind, {**cells, "tokens, no model": words}, main)
    similar = similarity(panel, kind, cells, words, residual, main)
    tables = {
        "panel": panel_table(panel, reliability, kind),
        "scores": scores_table(panel, reliability),
        **redundant["tables"],
        **similar["tables"],
    }
    return {
        "tables": {name: table.to_dict() for name, table in tables.items()},
        "models": list(panel.models),
        "score": kind,
        "main": main,
        "reliability": reliability,
        "means": {name: {n: s.mean(axis=0) for n, s in found.items()} for name, found in panel.scores.items()},
        "redundancy": redundant["numbers"],
        "similarity": similar["numbers"],
    }


def _key(cell: str) -> str:
    layer, form = cell.removeprefix("layer ").split(", ")
    return f"{layer}/{form}/residual"


def _split(rows: Array, sets: Mapping[str, Sequence[Item]]) -> list[Array]:
    return np.split(rows, np.cumsum([len(found) for found in sets.values()])[:-1])


def panel_table(panel: Panel, reliability: Mapping[str, Mapping[str, float]], kind: str) -> Table:
    """Is the panel able to rank? Accuracy of the pretrained models, and reliability of the ranking, by benchmark."""
    base = [model for model in panel.models if model.endswith(" base")]
    rows: list[list[Any]] = []
    for name, correct in panel.scores["accuracy"].items():
        cells = [spread(by_group(correct[:, panel.models.index(model)])) for model in base]
        own = [f"{panel.own[model][name].mean():.2f}" if name in panel.own[model] else "-" for model in base]
        means = correct.mean(axis=0)
        ranks = [f"{reliability[which][name]:.2f}" for which in ("accuracy", kind)]
        rows.append([name, len(correct), *cells, " / ".join(own), f"{means.min():.2f} .. {means.max():.2f}", *ranks])
    names = [model.removesuffix(" base") for model in base]
    columns = ["benchmark", "items", *names, "own options", f"{len(panel.models)} models",
               "reliability, accuracy", f"reliability, {kind}"]  # fmt: skip
    caption = (
        "Accuracy; chance is 0.25 (own options: 0.25, aqua 0.20). 95 % t intervals over groups of four items with the "
        f"same answers. {len(panel.models)} models: lowest .. highest. Reliability of the ranking: halves of the items."
    )
    return Table("Can the panel rank models at all?", columns, rows, caption)


def scores_table(panel: Panel, reliability: Mapping[str, Mapping[str, float]]) -> Table:
    rows: list[list[Any]] = []
    base = [number for number, model in enumerate(panel.models) if model.endswith(" base")]
    for kind, found in panel.scores.items():
        chance = 0.0 if kind == "margin" else CHANCE
        above = [str(sum(_low(of[:, model]) > chance for of in found.values())) for model in base]
        mean = sum(_low(of.mean(axis=1)) > chance for of in found.values())
        ranked = sum(value > 0.5 for value in reliability[kind].values())
        rows.append(
            [kind, " / ".join(above), mean, f"{np.mean(list(reliability[kind].values())):.2f}", ranked,
             f"{similarity_reliability(list(found.values())):.2f}"]
        )  # fmt: skip
    columns = ["score of an item", "above chance, " + " / ".join(panel.models[model].removesuffix(" base") for model in base),
               "above chance, mean of the panel", "reliability of the ranking", "above 0.5", "reliability of the similarity of pairs"]  # fmt: skip
    caption = f"Of {len(found)} benchmarks; above chance: the 95 % interval is."
    return Table("Scores", columns, rows, caption)


def _low(values: Array) -> float:
    """Lower 95 % t limit over the groups."""
    from scipy import stats

    groups = by_group(values)
    return float(groups.mean() - stats.t.ppf(0.975, len(groups) - 1) * groups.std(ddof=1) / np.sqrt(len(groups)))


def redundancy(panel: Panel, kind: str, cells: Mapping[str, Mapping[str, ItemFeatures]], main: str) -> dict[str, Any]:
    """R-hat against R over the benchmarks that have as many items as the others, all cut to one size."""
    lengths = {name: len(found) for name, found in panel.scores[kind].items()}
    size = min(count for count in lengths.values() if count >= 0.85 * max(lengths.values()))
    names = [name for name, count in lengths.items() if count >= size]
    kinds = list(dict.fromkeys(["accuracy", kind]))
    cut = {which: {name: panel.scores[which][name][:size] for name in names} for which in kinds}
    names = [name for name in names if all(np.ptp(cut[which][name].mean(axis=0)) > 0 for which in kinds)]
    r = {which: [performance_redundancy(name, cut[which][name]).r for name in names] for which in kinds}
    found = {
        cell: [measure_redundancy(of_cell[name].select(np.arange(size)), repeats=0) for name in names]
        for cell, of_cell in cells.items()
    }
    predictors = {f"R-hat, {cell}": [one.r_hat.estimate for one in of_cell] for cell, of_cell in found.items()}
    predictors["spread of the panel's scores (control)"] = [float(cut[kind][n].mean(axis=0).std()) for n in names]
    rows: list[list[Any]] = []
    for predictor, values in predictors.items():
        row: list[Any] = [predictor + (" (chosen)" if predictor == f"R-hat, {main}" else "")]
        for which in kinds:
            row += _cells(correlate(values, r[which], "spearman", permutations=5000))
        rows.append(row)
    columns = ["from", *(title for which in kinds for title in (f"Spearman with R, {which}", "p"))]
    caption = f"{len(names)} benchmarks of {size} items each, {len(panel.models)} models. p by permutation of benchmarks, intervals by bootstrap over them."
    features = [cells[main][name].select(np.arange(size)) for name in names]
    sizes = random_sizes(features, cut["accuracy"])
    of_sizes = [
        [name, f"{np.median(values):.2f} ({np.quantile(values, 0.025):.2f} .. {np.quantile(values, 0.975):.2f})"]
        for name, values in sizes.items()
    ]
    title = "Spearman, sizes at random"
    size_caption = (
        f"Each benchmark cut to a random size of 8 to {size} items: median, 95 % of {len(sizes['R-hat and R'])} draws."
    )
    by_set = [
        [
            name,
            f"{one.r_hat.estimate:.2f} ({one.r_hat.low:.2f} .. {one.r_hat.high:.2f})",
            one.items_for_90,
            *(f"{r[which][row]:.2f}" for which in kinds),
        ]
        for row, (name, one) in enumerate(zip(names, found[main], strict=True))
    ]
    return {
        "tables": {
            "redundancy": Table("Does R-hat predict R?", columns, rows, caption),
            "sizes": Table("How much of it would be size", ["of", title], of_sizes, size_caption),
            "by_benchmark": Table("Redundancy", ["benchmark", f"R-hat, {main}", "items for 90 % of the features", *(f"R, {which}" for which in kinds)], by_set, "95 % jackknife intervals over items."),
        },
        "numbers": {"benchmarks": names, "size": size, "r": r, **predictors},
    }  # fmt: skip


def similarity(panel: Panel, kind: str, cells: Mapping[str, Mapping[str, ItemFeatures]], words: Mapping[str, ItemFeatures],
               residual: Mapping[str, Array], main: str) -> dict[str, Any]:  # fmt: skip
    """Overlap of features against the correlation of scores over models, for all pairs of benchmarks."""
    every = list(words)
    names = [name for name in panel.scores[kind] if name != CONTROL]
    at = np.ix_(*[[every.index(name) for name in names]] * 2)
    overlaps = {cell: measure_overlap([of[name] for name in names]).values("overlap_min") for cell, of in cells.items()}
    lengths = np.log([words[name].sizes.mean() for name in names])
    controls = {
        "tokens, no model": measure_overlap([words[name] for name in names]).values("overlap_min"),
        "likeness of lengths": -np.abs(np.subtract.outer(lengths, lengths)),
        **{f"residual cosine, {main}": cosines(residual[main])[at]},
    }
    scores = ScoreTable(panel.models, tuple(panel.scores[kind]), panel.means(kind, list(panel.scores[kind])))
    targets = {
        "direct": scores.similarity(names),
        f"given {CONTROL}": scores.similarity(names, CONTROL),
        "given all others": leave_two_out(panel.means(kind, names)),
    }
    tables = {}
    for title, kept in (("overlap", names), ("overlap_english", [n for n in names if n not in OTHER_LANGUAGES])):
        inside = np.ix_(*[[names.index(name) for name in kept]] * 2)
        rows: list[list[Any]] = []
        for predictor, values in {**{f"overlap, {cell}": v for cell, v in overlaps.items()}, **controls}.items():
            row: list[Any] = [predictor + (" (chosen)" if predictor == f"overlap, {main}" else "")]
            for target in targets.values():
                row += _cells(correlate(values[inside], target[inside], "pearson", permutations=5000))
            if predictor in controls:
                row += [None, None]
            else:
                beyond = given_pairs(values[inside], targets["direct"][inside], controls["tokens, no model"][inside])
                row += [f"{beyond.value:.2f} ({beyond.low:.2f} .. {beyond.high:.2f})", f"{beyond.p:.4f}"]
            rows.append(row)
        columns = [
            "from",
            *(word for target in targets for word in (f"Pearson, {target}", "p")),
            "direct, given overlap of tokens",
            "p",
        ]
        caption = (
            f"{len(kept)} benchmarks, {len(kept) * (len(kept) - 1) // 2} pairs, {len(panel.models)} models, scored by {kind}. "
            "p by permuting benchmarks, intervals by bootstrap over benchmarks."
        )
        heading = "Does overlap predict how alike benchmarks rank models?"
        tables[title] = Table(heading + (" English ones only" if kept != names else ""), columns, rows, caption)
    spearman = correlate(overlaps[main], targets["direct"], "spearman", permutations=5000)
    numbers = {"benchmarks": names, **{f"overlap, {cell}": v for cell, v in overlaps.items()}, **controls, **targets}
    return {
        "tables": tables,
        "numbers": {
            **numbers,
            "spearman, chosen, direct": spearman._asdict() if hasattr(spearman, "_asdict") else vars(spearman),
        },
    }


def _cells(found: Correlation) -> list[str]:
    return [f"{found.value:.2f} ({found.low:.2f} .. {found.high:.2f})", f"{found.p:.4f}"]
