"""The tables of study 6.

The report's form, the last token of the question, in the middle layer was chosen beforehand. Other layers and forms
stand beside it, and tokens, lengths and the residual stream as controls. The kind of score is the one that ranks the
models most reliably, whatever features say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.real.panel.agreement import (
    SCORES,
    Array,
    Estimate,
    by_group,
    cosines,
    given_pairs,
    leave_two_out,
    overlap_min,
    random_sizes,
    ranking_reliability,
    similarity_reliability,
)
from benchmarks.real.panel.features import FORMS, by_benchmark
from benchmarks.real.panel.items import Item
from benchmarks.real.panel.likelihoods import hits
from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures
from qscope_posttrain.analysis.benchmarks.performance import Correlation, ScoreTable, correlate, performance_redundancy
from qscope_posttrain.analysis.benchmarks.redundancy import measure_redundancy
from qscope_posttrain.intervals import Interval
from qscope_posttrain.report.tables import Table

CONTROL = "mmlu_others"
"""Partialled out, as the report does with MMLU: subjects that are in no other set"""
OTHER_LANGUAGES = ("gaokao_math_qa", "mgsm_fr", "mgsm_ru", "mgsm_zh")
CHANCE = 0.25
RELIABLE = 0.5


@dataclass(frozen=True, eq=False)
class Panel:
    """Scores of the items that every model read."""

    models: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Array]]
    """{kind of score: {benchmark: [items, models]}}"""
    pretrained: Mapping[str, Mapping[str, Array]]
    """{pretrained model: {benchmark: [items] accuracy}}, of all items that it read"""
    own: Mapping[str, Mapping[str, Array]]
    """{pretrained model: {benchmark: [items] accuracy among the benchmark's own options}}"""

    def means(self, kind: str, names: Sequence[str]) -> Array:
        """[models, benchmarks]"""
        return np.stack([self.scores[kind][name].mean(axis=0) for name in names], axis=1)


@dataclass(frozen=True, eq=False)
class Cell:
    """What was read in one layer and form, of the items that every model read."""

    features: Mapping[str, ItemFeatures]
    residual: Mapping[str, Array]
    """{benchmark: mean [d_model]}"""


def read_panel(files: Mapping[str, Any], sets: Mapping[str, Sequence[Item]], own: Mapping[str, Sequence[Item]],
               items: int) -> Panel:  # fmt: skip
    """From {model: what likelihoods.py wrote}; of each benchmark the first `items` are compared."""
    right = {name: [item.right for item in found] for name, found in sets.items() if found[0].options}
    scores = {
        kind: {
            name: np.stack([score(_first(f["scores"][name], items), answers[:items]) for f in files.values()], axis=1)
            for name, answers in right.items()
        }
        for kind, score in SCORES.items()
    }
    base = {model: file for model, file in files.items() if "own_options" in file}
    pretrained = {
        model: {name: hits(file["scores"][name], answers) for name, answers in right.items()}
        for model, file in base.items()
    }
    with_own = {
        model: {name: hits(found, [item.right for item in own[name]]) for name, found in file["own_options"].items()}
        for model, file in base.items()
    }
    return Panel(tuple(files), scores, pretrained, with_own)


def _first(likelihoods: Mapping[str, Sequence[Any]], items: int) -> dict[str, Any]:
    return {name: rows[:items] for name, rows in likelihoods.items()}


def by_cell(sets: Mapping[str, Sequence[Item]], read: Mapping[str, Any], layers: Sequence[int],
            items: int) -> dict[str, Cell]:  # fmt: skip
    """{layer and form: cell} from what features.py read of the same sets; the first `items` of each benchmark."""
    stops = np.cumsum([len(found) for found in sets.values()])[:-1]
    cells = {}
    for layer in layers:
        for form in FORMS:
            features = by_benchmark(sets, *(read[f"{layer}/{form}/{what}"] for what in ("sizes", "indices", "width")))
            rows = dict(zip(sets, np.split(read[f"{layer}/{form}/residual"], stops), strict=True))
            cells[f"layer {layer}, {form}"] = Cell(
                {name: one.select(np.arange(min(items, len(one)))) for name, one in features.items()},
                {name: part[:items].mean(axis=0) for name, part in rows.items()},
            )
    return cells


def study(
    panel: Panel, cells: Mapping[str, Cell], tokens: Mapping[str, Sequence[Sequence[int]]], layers: Sequence[int]
) -> dict[str, Any]:
    """All tables, and the numbers behind them."""
    scored = list(panel.scores["accuracy"])
    reliability = {kind: {n: ranking_reliability(panel.scores[kind][n]) for n in scored} for kind in SCORES}
    kind = max(SCORES, key=lambda name: float(np.mean(list(reliability[name].values()))))
    main = f"layer {layers[len(layers) // 2]}, last"
    width = 1 + max(token for of_set in tokens.values() for ids in of_set for token in ids)
    words = {name: ItemFeatures.from_sets(name, ids, width) for name, ids in tokens.items()}
    features = {name: cell.features for name, cell in cells.items()}
    redundant = redundancy(panel, kind, {**features, "tokens, no model": words}, main)
    similar = similarity(panel, kind, features, words, cells[main].residual, main)
    tables = {
        "pretrained": pretrained_table(panel),
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
        "r_hat": {name: measure_redundancy(of, repeats=0).r_hat.estimate for name, of in features[main].items()},
        "redundancy": redundant["numbers"],
        "similarity": similar["numbers"],
    }


def pretrained_table(panel: Panel) -> Table:
    """Accuracy of the pretrained models: are they above chance at all?"""
    base = list(panel.pretrained)
    rows: list[list[Any]] = []
    for name, found in panel.pretrained[base[0]].items():
        cells = [accuracy(panel.pretrained[model][name]).text(".2f") for model in base]
        own = [_of_items(panel.own[model][name]) if name in panel.own[model] else None for model in base]
        rows.append([name, len(found), *cells, *own])
    pooled = {
        model: np.concatenate([right for name, right in panel.own[model].items() if name != "aqua"])
        for model in base
        if panel.own[model]
    }
    if pooled:
        rows.append(["all but aqua", len(pooled[base[0]]), *(None for _ in base), *map(_of_items, pooled.values())])
    columns = ["benchmark", "items", *map(short, base), *(f"{short(model)}, own options" for model in base)]
    caption = (
        "Accuracy [95 %]; chance is 0.25, among the own options of aqua 0.20. t intervals over groups of four items "
        "with the same answers; own options: normal intervals over items, a few more or fewer in some benchmarks."
    )
    return Table("The pretrained models", columns, rows, caption)


def _of_items(right: Array) -> str:
    reach = 1.96 * right.std(ddof=1) / np.sqrt(len(right))
    return f"{right.mean():.2f} [{right.mean() - reach:.2f}, {right.mean() + reach:.2f}]"


def panel_table(panel: Panel, reliability: Mapping[str, Mapping[str, float]], kind: str) -> Table:
    """Spread of the panel, and reliability of its ranking, by benchmark."""
    rows: list[list[Any]] = []
    for name, correct in panel.scores["accuracy"].items():
        means = correct.mean(axis=0)
        ranks = [f"{reliability[which][name]:.2f}" for which in ("accuracy", kind)]
        rows.append([name, len(correct), f"{means.min():.2f} .. {means.max():.2f}", *ranks])
    columns = ["benchmark", "items", "accuracy", "reliability, accuracy", f"reliability, {kind}"]
    caption = (
        f"Accuracy of {len(panel.models)} models, lowest .. highest, on the items that all read. Reliability of the "
        "ranking of the models: from halves of these items."
    )
    return Table("Can the panel rank models?", columns, rows, caption)


def short(model: str) -> str:
    return model.removesuffix(" base")


def scores_table(panel: Panel, reliability: Mapping[str, Mapping[str, float]]) -> Table:
    """By kind of score: benchmarks above chance, and reliability of what is compared with features."""
    base = list(panel.pretrained)
    rows: list[list[Any]] = []
    for kind, found in panel.scores.items():
        chance = 0.0 if kind == "margin" else CHANCE
        at = [panel.models.index(model) for model in base]
        above = [sum(accuracy(of[:, number]).low > chance for of in found.values()) for number in at]
        mean = sum(accuracy(of.mean(axis=1)).low > chance for of in found.values())
        values = np.array(list(reliability[kind].values()))
        pairs = similarity_reliability(list(found.values()))
        rows.append([kind, *above, mean, f"{values.mean():.2f}", int((values > RELIABLE).sum()), f"{pairs:.2f}"])
    columns = ["score of an item", *(f"above chance, {short(model)}" for model in base), "above chance, panel's mean"]
    columns += ["reliability of the ranking", f"benchmarks above {RELIABLE}", "reliability of likeness of pairs"]
    caption = f"Of {len(panel.scores['accuracy'])} benchmarks. Above chance: the 95 % interval over groups is."
    return Table("Benchmarks above chance", columns, rows, caption)


def accuracy(values: Array) -> Interval:
    """Mean of the items, with 95 % t limits over the groups that share their answers."""
    groups = by_group(values)
    reach = stats.t.ppf(0.975, len(groups) - 1) * groups.std(ddof=1) / np.sqrt(len(groups))
    return Interval(float(groups.mean()), float(groups.mean() - reach), float(groups.mean() + reach))


Cells = Mapping[str, Mapping[str, ItemFeatures]]
"""{layer and form: {benchmark: features}}"""


def redundancy(panel: Panel, kind: str, cells: Cells, main: str) -> dict[str, Any]:
    """R-hat against R over the benchmarks of equal size."""
    kinds = list(dict.fromkeys(["accuracy", kind]))
    of_equal_size, size = equal_size(panel)
    cut = {which: {name: panel.scores[which][name] for name in of_equal_size} for which in kinds}
    names = [name for name in of_equal_size if all(np.ptp(cut[which][name].mean(axis=0)) > 0 for which in kinds)]
    r = {which: [performance_redundancy(name, cut[which][name]).r for name in names] for which in kinds}
    measured = {
        cell: [measure_redundancy(of_cell[name], repeats=0) for name in names] for cell, of_cell in cells.items()
    }
    predictors = {f"R-hat, {cell}": [one.r_hat.estimate for one in of_cell] for cell, of_cell in measured.items()}
    predictors["spread of the scores over models"] = [float(cut[kind][name].mean(axis=0).std()) for name in names]
    rows = [
        [
            _marked(name, f"R-hat, {main}"),
            *(_cell(correlate(values, r[which], "spearman", permutations=5000)) for which in kinds),
        ]
        for name, values in predictors.items()
    ]
    columns = ["from", *(f"Spearman with R, {which}" for which in kinds)]
    caption = (
        f"{len(names)} benchmarks, {size} items of each, {len(panel.models)} models. p by permuting benchmarks, 95 % "
        "intervals by bootstrap over benchmarks."
    )
    sizes = random_sizes([cells[main][name] for name in names], cut["accuracy"])
    by_set: list[list[Any]] = [
        [name, one.r_hat.text(".2f"), one.items_for_90, *(f"{r[which][row]:.2f}" for which in kinds)]
        for row, (name, one) in enumerate(zip(names, measured[main], strict=True))
    ]
    own = ["benchmark", f"R-hat, {main}", "items for 90 % of the features", *(f"R, {which}" for which in kinds)]
    tables = {
        "redundancy": Table("Does R-hat predict R?", columns, rows, caption),
        "sizes": Table(
            "How much agreement sizes alone make",
            ["of", "Spearman"],
            [[name, f"{np.median(v):.2f} ({np.quantile(v, 0.025):.2f} .. {np.quantile(v, 0.975):.2f})"]
             for name, v in sizes.items()],
            f"Every benchmark cut to a random size from 8 to {size} items: median and 95 % of "
            f"{len(sizes['R-hat and R'])} draws. R by accuracy.",
        ),
        "by_benchmark": Table("Redundancy", own, by_set, "95 % jackknife intervals over items."),
    }  # fmt: skip
    return {"tables": tables, "numbers": {"benchmarks": names, "size": size, "R": r, **predictors, "sizes": sizes}}


def equal_size(panel: Panel) -> tuple[list[str], int]:
    """The benchmarks that have as many items as the largest one, and how many: R-hat and overlap depend on the size."""
    lengths = {name: len(found) for name, found in panel.scores["accuracy"].items()}
    size = max(lengths.values())
    return [name for name, count in lengths.items() if count == size], size


def _marked(name: str, main: str) -> str:
    return f"{name} (chosen beforehand)" if name == main else name


def similarity(panel: Panel, kind: str, cells: Cells, words: Mapping[str, ItemFeatures],
               residual: Mapping[str, Array], main: str) -> dict[str, Any]:  # fmt: skip
    """Overlap of features against the correlation of scores over models, for all pairs of benchmarks."""
    names = [name for name in equal_size(panel)[0] if name != CONTROL]

    lengths = np.log([words[name].sizes.mean() for name in names])
    tokens = overlap_min([words[name] for name in names])
    predictors = {f"overlap, {cell}": overlap_min([of[name] for name in names]) for cell, of in cells.items()} | {
        "overlap of tokens, no model": tokens,
        "likeness of lengths": -np.abs(np.subtract.outer(lengths, lengths)),
        f"cosine of the residual stream, {main}": cosines(np.stack([residual[name] for name in names])),
    }
    scores = ScoreTable(panel.models, tuple(panel.scores[kind]), panel.means(kind, list(panel.scores[kind])))
    direct = scores.similarity(names)
    targets = {
        "direct": direct,
        f"given {CONTROL}": scores.similarity(names, CONTROL),
        "given all others": leave_two_out(panel.means(kind, names)),
    }
    title = "Does overlap predict how alike two benchmarks rank models?"
    english = [name for name in names if name not in OTHER_LANGUAGES]
    tables = {}
    for key, heading, kept in (("overlap", title, names), ("english", title + " English benchmarks", english)):
        inside = np.ix_(*[[names.index(name) for name in kept]] * 2)
        rows: list[list[Any]] = []
        for name, values in predictors.items():
            row: list[Any] = [_marked(name, f"overlap, {main}")]
            row += [
                _cell(correlate(values[inside], of[inside], "pearson", permutations=5000)) for of in targets.values()
            ]
            beyond = None if values is tokens else given_pairs(values[inside], direct[inside], tokens[inside])
            rows.append([*row, None if beyond is None else _cell(beyond)])
        columns = ["from", *targets, "direct, given overlap of tokens"]
        caption = (
            f"Pearson's correlation over the {len(kept) * (len(kept) - 1) // 2} pairs of {len(kept)} benchmarks; "
            f"likeness: correlation of {kind} over {len(panel.models)} models. p by permuting benchmarks, intervals of "
            "95 % by bootstrap over them."
        )
        tables[key] = Table(heading, columns, rows, caption)
    ranks = correlate(predictors[f"overlap, {main}"], direct, "spearman", permutations=5000)
    numbers = {"benchmarks": names, **predictors, **targets, "Spearman, chosen, direct": asdict(ranks)}
    return {"tables": tables, "numbers": numbers}


def _cell(found: Correlation | Estimate) -> str:
    return f"{found.value:.2f} ({found.low:.2f} .. {found.high:.2f}), p {found.p:.3f}"
