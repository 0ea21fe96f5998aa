"""`qscope classify fit`, `predict` and `report`: classifiers of texts made of a few features, and their baselines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.options import chosen, layers_of, load, load_saes
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.parsing.table import MODEL, SAES
from qscope_posttrain.errors import UserValueError, library_refusals, require_extra
from qscope_posttrain.report.progress import progress, status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.text.inputs import (
    READERS,
    WRITERS,
    column,
    labels_of,
    read_table,
    split_rows,
    texts_of,
    write_table,
)

if TYPE_CHECKING:
    from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer

FILE_NAME = "classifier.safetensors"
DATA = f"""
--data: text required  # table ({", ".join(READERS)}), folder written by datasets, or hub id
--split: text = train  # split of a data set with several
--text-column: text = text  # column with the texts
--max-texts --tokens-per-batch
"""
LEARNING = """
--label-column: text = label  # column with the labels
--positive: text  # the positive label; may be left out if labels are 0/1 or false/true
--max-length
--folds: int = 5  # folds of the cross-validation on the discovery texts
--seed --output
"""
FIT = """
--features: int+ = 1  # features per layer; cross-validation picks among several
--rule: or|votes|logistic = or  # how features decide together
--layer-count: int = 1  # number of layers to combine, the best by top1-diff
--layer-by: top1-diff|validation = top1-diff  # how a layer is chosen
--thresholds: zero|best = zero  # activation above which one fires
"""
PREDICT = f"""
--classifier: text required  # {FILE_NAME}, or the folder that holds it
--score-column: text = score  # name of the new column of scores; above 0 is positive
--decision-column: text = positive  # name of the new column of decisions, true or false
--drop: positive|negative  # leave out the rows with this decision
--texts-at-once: int = 2000  # number of texts whose features are in memory
--output  # table ({", ".join(WRITERS)}) beside which summary.json goes, or folder for load_from_disk
"""
REPORT = """
--group-column: text  # column of languages or other groups: learned apart, tested on each other
--test-data: text  # another table to test on; by default a share of --data
--test-split: text = test  # split of --test-data, if it has several
--test-share: float = 0.2  # share of each group and class that is tested on
--methods: text+  # names of methods; all by default
--draws: int = 5  # random parts per point of the data curve; 0: no curve
--fractions: float+ = 0.01 0.02 0.05 0.1 0.2 0.5 1.0  # shares of the data on the curve
--resamples: int = 1000  # resamples of the bootstrap over test texts
"""


def fit(options: argparse.Namespace) -> None:
    """Learn a classifier from labeled texts, print its features, and write it and `summary.json`."""
    require_extra("analysis")
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier
    from qscope_posttrain.analysis.classifier.featurizer import stack

    output = writable_folder(options.output)
    texts, labels, _ = _labeled(options, options.data, options.split)
    featurizer = _featurizer(options, options.layers, options.max_length)
    features = featurizer.features(texts)
    cut = int(next(iter(features.values())).truncated.sum())
    if cut:
        status(f"{cut} of {len(texts)} texts are longer than {options.max_length} tokens; their ends are not read")
    classifier = FeatureClassifier(
        options.features[0], rule=options.rule, n_layers=options.layer_count, thresholds=options.thresholds
    )
    grid: dict[str, Any] = {"k": options.features}
    if options.layer_by == "validation":
        grid["layer"] = sorted(features)
    if max(map(len, grid.values())) > 1:
        with library_refusals(f"--folds {options.folds}"):
            folds = StratifiedKFold(options.folds, shuffle=True, random_state=options.seed)
            splits = list(folds.split(labels, labels))
        classifier.set_params(layer_widths=featurizer.layer_widths)
        search = GridSearchCV(classifier, grid, scoring="f1", cv=splits, error_score="raise")
        classifier.set_params(**search.fit(stack(features)[0], labels).best_params_)
        status(f"chosen by cross-validation: {search.best_params_}, F1 {search.best_score_:.3f}")
    classifier.fit(features, labels)
    classifier.adopt(featurizer.with_norms(features))
    shown = classifier.to_table()
    shown.print()
    path = classifier.save(output / FILE_NAME)
    results = {
        "classifier": path,
        "table": shown,
        "texts": len(texts),
        "positive": sum(labels),
        "parameters": {"k": classifier.k, "layer": classifier.layer},
        "top1_differences": classifier.top1_differences_,
        "origin": classifier.origin_,
    }
    write_summary(output, "classify fit", vars(options), results)
    status(f"classifier written to {path}")


def predict(options: argparse.Namespace) -> None:
    """Classify every row of a table, and write the table, filtered if asked, beside a `summary.json`."""
    require_extra("analysis")
    import numpy as np

    from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier

    target = Path(options.output)
    if target.suffix and target.suffix not in WRITERS:
        raise UserValueError(f"--output must end in {', '.join(WRITERS)}, or be a folder; got '{target}'.")
    folder = writable_folder(target.parent)
    place = Path(options.classifier)
    place = place / FILE_NAME if place.is_dir() else place
    layers = sorted(set(FeatureClassifier.load(place).feature_layers_.tolist()))
    table = read_table(options.data, options.split, options.max_texts)
    texts = texts_of(table, options.text_column, options.data)
    for name in (options.score_column, options.decision_column):
        if name in table.column_names:
            raise UserValueError(f"'{options.data}' has a column '{name}' already; choose another name.")
    featurizer = _featurizer(options, [str(layer) for layer in layers])
    classifier = FeatureClassifier.load(place, featurizer.with_settings({"show_progress": False}))
    starts = range(0, len(texts), options.texts_at_once)
    parts = [
        classifier.decision_function(texts[start : start + options.texts_at_once])
        for start in progress(starts, description="classifying")
    ]
    scores = np.concatenate(parts)
    positive = scores > 0
    table = table.add_column(options.score_column, scores.tolist())
    table = table.add_column(options.decision_column, positive.tolist())
    if options.drop is not None:
        table = table.select(np.flatnonzero(positive != (options.drop == "positive")).tolist())
    write_table(table, target)
    results = {"table": target, "texts": len(texts), "positive": int(positive.sum()), "rows": len(table)}
    write_summary(folder if target.suffix else target, "classify predict", vars(options), results)
    status(f"{int(positive.sum())} of {len(texts)} texts are positive; {len(table)} rows written to {target}")


def report(options: argparse.Namespace) -> None:
    """Compare feature classifiers with probes and controls, print tables, write `report.html` and `summary.json`."""
    require_extra("analysis", "report")
    from qscope_posttrain.analysis.classifier.methods import all_methods, collect_examples, methods_named
    from qscope_posttrain.analysis.classifier.report import make_report
    from qscope_posttrain.provenance import machine, package_versions
    from qscope_posttrain.report.html import write_html

    output = writable_folder(options.output)
    if options.folds < 2:
        raise UserValueError(f"--folds must be at least 2; got {options.folds}.")
    methods = all_methods() if options.methods is None else methods_named(options.methods)
    texts, labels, groups = _labeled(options, options.data, options.split)
    if options.test_data is not None:
        count = len(texts)
        more = _labeled(options, options.test_data, options.test_split)
        texts, labels, groups = texts + more[0], labels + more[1], groups + more[2]
        known, test = list(range(count)), list(range(count, len(texts)))
    else:
        known, test = split_rows(groups, labels, options.test_share, options.seed)
    featurizer = _featurizer(options, options.layers, options.max_length)
    examples = collect_examples(featurizer, texts, labels)
    parts = [
        {name: examples.take([row for row in rows if groups[row] == name]) for name in dict.fromkeys(groups)}
        for rows in (known, test)
    ]
    for name, part in [*parts[0].items(), *parts[1].items()]:
        if part.labels.all() or not part.labels.any():
            raise UserValueError(f"group '{name}' needs discovery and test texts of both classes.")
    settings = chosen(options, "folds", "draws", "fractions", "resamples", "seed")
    found = make_report(methods, *parts, **settings)
    for shown in found.tables():
        shown.print()
    write_summary(output, "classify report", vars(options), {**found.to_dict(), "origin": featurizer.origin()})
    facts = {**package_versions(), **machine(), "data": options.data, "model": options.model, "SAEs": options.sae}
    title = f"Feature classifiers on {Path(options.data).name}"
    page = write_html(output / "report.html", title, found.sections(), facts={k: str(v) for k, v in facts.items()})
    status(f"report written to {page}")


def build_parser() -> CommandParser:
    """The parser of `qscope classify`."""
    parser = CommandParser(prog="qscope classify")
    parser.command(fit, SAES, DATA, LEARNING, FIT)
    parser.command(predict, MODEL, "--sae --k", DATA, PREDICT)
    parser.command(report, SAES, DATA, LEARNING, REPORT)
    return parser


def _featurizer(options: argparse.Namespace, words: Sequence[str], max_length: int = 512) -> TextFeaturizer:
    """Model, tokenizer and the SAEs of the layers."""
    from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer

    model, tokenizer = load(options)
    saes = load_saes(options, layers_of(words, model), model)
    return TextFeaturizer(model, tokenizer, saes, max_length=max_length, tokens_per_batch=options.tokens_per_batch)


def _labeled(options: argparse.Namespace, source: str, split: str) -> tuple[list[str], list[bool], list[str]]:
    """(texts, labels, groups) of a table; a single group "all" without a column of groups."""
    table = read_table(source, split, options.max_texts)
    texts = texts_of(table, options.text_column, source)
    labels = labels_of(table, options.label_column, options.positive, source)
    group = getattr(options, "group_column", None)
    groups = ["all"] * len(texts) if group is None else [str(value) for value in column(table, group, source)]
    return texts, labels, groups
