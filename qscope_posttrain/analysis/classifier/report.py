"""Report a classification task: numbers, tables and figures for one group of texts or for several languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier
from qscope_posttrain.analysis.classifier.featurizer import layer_slice
from qscope_posttrain.analysis.classifier.methods import COUNTS, LabeledTexts, Method, choice_of
from qscope_posttrain.analysis.classifier.metrics import METRICS, Evaluation, evaluate, firing_rates, top_features
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval
from qscope_posttrain.report.html import Figure, Section
from qscope_posttrain.report.plots import Curve, line_curves
from qscope_posttrain.report.progress import progress, status
from qscope_posttrain.report.tables import Table

JACCARD_TOP = 10
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
REFERENCE = "logistic on the residual"  # The usual probe, which needs no SAE; the differences are taken against it
CURVES = (
    "OR, layer by top1-diff", "logistic on top features", "logistic on the residual", "difference of means",
    "bag of tokens",
)  # fmt: skip
"""Methods whose data curve is drawn: those that are quick to fit many times."""
TRANSFER = ("OR, best thresholds", "votes", "logistic on all features", *CURVES)  # Shown in a table of transfer


@dataclass(frozen=True)
class LayerRow:
    """One layer and K, fitted on discovery texts without choosing anything, measured on test texts."""

    layer: int
    k: int
    top1_difference: float
    f1: float


@dataclass(frozen=True, eq=False)
class ClassifierReport:
    """All measurements of one task."""

    sizes: Mapping[str, tuple[int, ...]]  # By group: positive and negative discovery texts, then test texts
    evaluations: Mapping[str, Mapping[str, Mapping[str, Evaluation]]]  # Method -> group learned on -> group tested on
    choices: Mapping[str, Mapping[str, str]]  # Method -> group -> its choices in words
    layers: Mapping[str, Sequence[LayerRow]]  # Group -> every layer and K on its own test texts
    chosen_layers: Mapping[str, int]  # Group -> layer by top1-diff, from discovery texts alone
    jaccard: Mapping[int, Mapping[str, float]]  # Layer -> pair of groups, "A/B" -> overlap of their top sets
    curves: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]]  # Group -> method -> share -> F1 of each draw

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON values."""
        evaluations = {
            method: {one: {two: e.to_dict() for two, e in row.items()} for one, row in rows.items()}
            for method, rows in self.evaluations.items()
        }
        layers = {group: [vars(row) for row in rows] for group, rows in self.layers.items()}
        return {**vars(self), "evaluations": evaluations, "layers": layers}

    def tables(self) -> list[Table]:
        """All tables, in the order of the page."""
        return [table for section in self.sections() for table in section.tables]

    def sections(self) -> list[Section]:
        """The parts of the HTML page: methods by group, data curve, transfer and Jaccard, layers."""
        sections = [Section("Methods", _METHODS, [self._methods_table(group) for group in self.sizes])]
        if self.curves:
            sections.append(Section("How much data", "", figures=[self._curve_figure()]))
        if len(self.sizes) > 1:
            moved = [self._transfer_table(method) for method in self.evaluations if method in TRANSFER]
            sections.append(Section("From one group to another", _TRANSFER, [*moved, self._jaccard_table()]))
        return [*sections, Section("Layers", _LAYERS, [self._layer_table(group) for group in self.sizes])]

    def _curve_figure(self) -> Figure:
        """F1 over the share of the discovery texts, mean over the groups, with a band over the draws."""
        groups, curves = list(self.curves.values()), []
        for name, points in groups[0].items():
            draws = [draw_interval(np.mean([of[name][share] for of in groups], axis=0)) for share in points]
            x = [100 * share for share in points]
            low, high = ([getattr(draw, side) for draw in draws] for side in ("low", "high"))
            curves.append(Curve(name, x, [draw.estimate for draw in draws], low, high))
        drawn = line_curves(curves, "discovery texts, %", "F1 on test texts", x_marks=x)
        mean = f"mean over {', '.join(self.curves)}" if len(groups) > 1 else next(iter(self.curves))
        return Figure(drawn, f"F1, {mean}. Everything is learned and chosen on the part; band: 95 % t over draws.")

    def _methods_table(self, group: str) -> Table:
        rows = []
        for method, evaluations in self.evaluations.items():
            found, versus = evaluations[group][group], "-"
            if REFERENCE in self.evaluations and method != REFERENCE:
                versus = found.difference(self.evaluations[REFERENCE][group][group], "f1").text("+.3f")
            cells = [_cell(found.interval(name)) for name in METRICS]
            rows.append([method, *cells, versus, self.choices[method][group]])
        inside, outside, test_inside, test_outside = self.sizes[group]
        return Table(
            f"Methods, {group}",
            ["method", "F1", "precision", "recall", "TPR at FPR 1 %", "TPR at 5 %", "AUROC", "F1 vs probe", "choice"],
            rows,
            f"Learned and chosen on {inside} positive and {outside} negative texts, measured on {test_inside} and "
            f"{test_outside}. Intervals: 95 %, bootstrap over test texts, paired for the difference in F1 to "
            f"{REFERENCE}. TPR at a fixed FPR: threshold read off the test texts.",
        )

    def _transfer_table(self, method: str) -> Table:
        rows: list[list[Any]] = []
        for source, row in self.evaluations[method].items():
            cells = [_cell(row[target].interval("f1")) for target in row]
            away = [found.values["f1"] for target, found in row.items() if target != source]
            rows.append([source, *cells, float(np.mean(away))])
        caption = "F1. Rows: learned on; columns: tested on. The last column is the mean over the others."
        return Table(f"Transfer, {method}", ["learned on", *self.sizes, "others"], rows, caption)

    def _jaccard_table(self) -> Table:
        pairs = list(next(iter(self.jaccard.values())))
        rows = [
            [layer, *(values[pair] for pair in pairs), float(np.mean(list(values.values())))]
            for layer, values in self.jaccard.items()
        ]
        caption = "|A and B| / |A or B| of the features with the largest firing-rate difference in each group."
        columns = ["layer", *pairs, "mean"]
        return Table(f"Overlap of the top {JACCARD_TOP} features", columns, rows, caption)

    def _layer_table(self, group: str) -> Table:
        counts = sorted({row.k for row in self.layers[group]})
        best = max(self.layers[group], key=lambda row: row.f1)
        rows: list[list[Any]] = []
        for layer in dict.fromkeys(row.layer for row in self.layers[group]):
            of_layer = {row.k: row for row in self.layers[group] if row.layer == layer}
            mark = "top1-diff" if layer == self.chosen_layers[group] else ""
            note = ", ".join(filter(None, [mark, "best on the test texts" if layer == best.layer else ""]))
            rows.append([layer, of_layer[counts[0]].top1_difference, *(of_layer[k].f1 for k in counts), note])
        columns = ["layer", "largest difference", *(f"F1, K = {k}" for k in counts), "chosen by"]
        caption = (
            "OR rule, F1 on the test texts. The best of these cells is chosen on the test texts: it is no estimate."
        )
        return Table(f"Layers, {group}", columns, rows, caption)


def make_report(
    methods: Sequence[Method],
    discovery: Mapping[str, LabeledTexts],
    test: Mapping[str, LabeledTexts],
    *,
    folds: int = 5,
    resamples: int = 1000,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 5,
    seed: int = 0,
) -> ClassifierReport:
    """Fit and measure everything.

    Args:
        discovery: Group (a language, or "all") -> texts on which everything is learned and chosen.
        test: The same groups, other texts.
        resamples: Number of bootstrap resamples of the test texts.
        fractions: Shares of the discovery texts in the data-efficiency curve.
        draws: Number of parts drawn for each share; 0 leaves the curve out.
    """
    evaluations: dict[str, dict[str, dict[str, Evaluation]]] = {method.name: {} for method in methods}
    choices: dict[str, dict[str, str]] = {method.name: {} for method in methods}
    sizes: dict[str, tuple[int, ...]] = {}
    layers, chosen, curves = {}, {}, {}
    for group, texts in discovery.items():
        status(f"{group}: {len(texts)} discovery texts, {len(test[group])} test texts")
        sizes[group] = tuple(
            int(count) for part in (texts, test[group]) for count in (part.labels.sum(), (~part.labels).sum())
        )
        for method in progress(methods, description="fitting the methods"):
            fitted = method.fit(texts, folds=folds, seed=seed)
            found = {other: measure(method, fitted, part, resamples) for other, part in test.items()}
            evaluations[method.name][group], choices[method.name][group] = found, choice_of(fitted)
        layers[group] = by_layer(texts, test[group])
        chosen[group] = max(layers[group], key=lambda row: (row.top1_difference, -row.layer)).layer
        if draws:
            quick = [method for method in methods if method.name in CURVES]
            curves[group] = efficiency(
                quick, texts, test[group], fractions=fractions, draws=draws, folds=folds, seed=seed
            )
    jaccard = jaccard_by_layer(discovery) if len(discovery) > 1 else {}
    return ClassifierReport(sizes, evaluations, choices, layers, chosen, jaccard, curves)


def measure(method: Method, fitted: Any, texts: LabeledTexts, resamples: int = 1000) -> Evaluation:
    """Measure a fitted method on labeled texts."""
    matrix = texts.inputs[method.reads]
    scores = fitted.decision_function(matrix) if method.ranks else None
    return evaluate(texts.labels, fitted.predict(matrix), scores, resamples=resamples)


def by_layer(discovery: LabeledTexts, test: LabeledTexts, counts: Sequence[int] = COUNTS) -> list[LayerRow]:
    """F1 of the OR rule on the test texts for every layer and K: the cells whose maximum figure 8 of the report shows.
    Their maximum is chosen on the test texts, so it estimates nothing that could have been deployed."""
    rows = []
    for layer in discovery.features:
        for k in counts:
            classifier = FeatureClassifier(k, layer=layer, layer_widths=discovery.features)
            classifier.fit(discovery.inputs["features"], discovery.labels)
            predicted = classifier.predict(test.inputs["features"])
            f1 = evaluate(test.labels, predicted, resamples=1).values["f1"]
            rows.append(LayerRow(layer, k, classifier.top1_differences_[layer], f1))
    return rows


def jaccard_by_layer(discovery: Mapping[str, LabeledTexts], top: int = JACCARD_TOP) -> dict[int, dict[str, float]]:
    """Per layer, for each pair of groups "A/B", |A and B| / |A or B| of their `top` features by Delta."""
    chosen: dict[int, dict[str, set[int]]] = {}
    for group, texts in discovery.items():
        difference = firing_rates(texts.inputs["features"], texts.labels).difference
        for layer in texts.features:
            part = difference[layer_slice(texts.features, layer)]
            chosen.setdefault(layer, {})[group] = set(top_features(part, top).tolist())
    pairs = [(one, two) for one in discovery for two in discovery if one < two]
    return {
        layer: {f"{a}/{b}": len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs}
        for layer, sets in chosen.items()
    }


def efficiency(
    methods: Sequence[Method],
    discovery: LabeledTexts,
    test: LabeledTexts,
    *,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 5,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, dict[float, list[float]]]:
    """{method: {fraction: [F1 of each draw]}}: everything, choices included, learned from a part of the texts, drawn
    within each class. All of it is one draw."""
    found: dict[str, dict[float, list[float]]] = {method.name: {} for method in methods}
    plan = [(share, draw) for share in fractions for draw in range(draws if share < 1 else 1)]
    for share, draw in progress(plan, description="learning from parts of the texts"):
        part = discovery.take(draw_rows(discovery.labels, share, seed + draw))
        for method in methods:
            fitted = method.fit(part, folds=folds, seed=seed + draw)
            found[method.name].setdefault(share, []).append(measure(method, fitted, test, resamples=1).values["f1"])
    return found


def draw_rows(labels: Any, share: float, seed: int) -> list[int]:
    """Draw rows with the same share of both classes, at least one of each; ascending. `share` lies in (0, 1]."""
    if not 0 < share <= 1:
        raise UserValueError(f"a part must be a share in (0, 1], got {share}.")
    generator = np.random.default_rng(seed)
    rows: list[int] = []
    for kind in (False, True):
        places = np.flatnonzero(np.asarray(labels) == kind)
        rows += generator.permutation(places)[: max(1, round(share * len(places)))].tolist()
    return sorted(rows)


def draw_interval(values: Any, level: float = 0.95) -> Interval:
    """Mean of independent draws with its t interval, within [0, 1]; the value alone where there is one draw."""
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) < 2 or not sample.std():
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(level, len(sample) - 1, mean, stats.sem(sample))
    return Interval(mean, max(0.0, float(low)), min(1.0, float(high)))


def _cell(interval: Interval) -> str:
    return "-" if np.isnan(interval.estimate) else interval.text()


_METHODS = (
    "Layers, numbers of features and regularization are chosen by cross-validation on discovery texts, by F1. For OR "
    "and votes the ranking counts the features that fire. *Bag of tokens* and *length* read no model: they show how "
    "easy the task is."
)
_TRANSFER = "Everything, choices included, is learned on one group and measured on the others."
_LAYERS = "The OR rule with every layer and K, and the layer that the firing-rate differences choose."
