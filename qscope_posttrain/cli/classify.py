"""`qscope classify`: fit a feature classifier, apply it to a data set, compare it with its baselines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qscope_posttrain.cli.classify_data import (
    WRITERS,
    add_data_options,
    add_feature_options,
    labels_of,
    make_featurizer,
    read_table,
    split_rows,
    texts_of,
    write_table,
)
from qscope_posttrain.cli.classify_data import column as column_of
from qscope_posttrain.cli.options import OptionParser, add_model_options
from qscope_posttrain.errors import UserValueError, library_refusals, require_extra
from qscope_posttrain.report.progress import progress, status
from qscope_posttrain.report.summary import writable_folder, write_summary

FILE_NAME = "classifier.safetensors"


def run(arguments: Sequence[str]) -> int:
    """Run the sub-command and return the exit status."""
    options = _parser().parse(arguments)
    require_extra("analysis", *(["report"] if options.action == "report" else []))
    {"fit": fit, "predict": predict, "report": report}[options.action](options)
    return 0


def fit(options: argparse.Namespace) -> None:
    """Learn from a labelled table, print the features, write `classifier.safetensors` and `summary.json`."""
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier

    output = writable_folder(options.output)
    table = read_table(options.data, options.split, options.max_texts)
    texts = texts_of(table, options.text_column, options.data)
    labels = labels_of(table, options.label_column, options.positive, options.data)
    featurizer = make_featurizer(options, options.layers, options.max_length)
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
        from qscope_posttrain.analysis.classifier.columns import stack

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
    results = {"classifier": path, "table": shown, "texts": len(texts), "positive": sum(labels)}
    results |= {
        "parameters": {"k": classifier.k, "layer": classifier.layer},
        "top1_differences": classifier.top1_differences_,
    }
    results["origin"] = classifier.origin_
    write_summary(output, "classify fit", vars(options), results)
    status(f"classifier written to {path}")


def predict(options: argparse.Namespace) -> None:
    """Score every row of a table, and write the table with the score and the decision, or without some rows."""
    from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier

    target = Path(options.output)
    if target.suffix and target.suffix not in WRITERS:
        raise UserValueError(f"--output must end in {', '.join(WRITERS)}, or be a folder; got '{target}'.")
    writable_folder(target.parent)
    place = Path(options.classifier)
    place = place / FILE_NAME if place.is_dir() else place
    layers = sorted(set(FeatureClassifier.load(place).feature_layers_.tolist()))
    table = read_table(options.data, options.split, options.max_texts)
    texts = texts_of(table, options.text_column, options.data)
    for name in (options.score_column, options.decision_column):
        if name in table.column_names:
            raise UserValueError(
                f"'{options.data}' has a column '{name}' already; choose another name for the new one."
            )
    featurizer = make_featurizer(options, [str(layer) for layer in layers])
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
    status(f"{int(positive.sum())} of {len(texts)} texts are positive; {len(table)} rows written to {target}")


def report(options: argparse.Namespace) -> None:
    """Compare the classifiers with probes and controls, print the tables, write `report.html` and `summary.json`."""
    from qscope_posttrain.analysis.classifier.examples import collect_examples
    from qscope_posttrain.analysis.classifier.methods import all_methods, methods_named
    from qscope_posttrain.analysis.classifier.report import make_report
    from qscope_posttrain.provenance import machine, package_versions
    from qscope_posttrain.report.html import write_html

    output = writable_folder(options.output)
    if options.folds < 2:
        raise UserValueError(f"--folds must be at least 2; got {options.folds}.")
    methods = all_methods() if options.methods is None else methods_named(options.methods)
    texts, labels, groups = _grouped(options, options.data, options.split)
    if options.test_data is not None:
        count = len(texts)
        more = _grouped(options, options.test_data, options.test_split)
        texts, labels, groups = texts + more[0], labels + more[1], groups + more[2]
        known, test = list(range(count)), list(range(count, len(texts)))
    else:
        known, test = split_rows(groups, labels, options.test_share, options.seed)
    featurizer = make_featurizer(options, options.layers, options.max_length)
    examples = collect_examples(featurizer, texts, labels)
    parts = [
        {name: examples.take([row for row in rows if groups[row] == name]) for name in dict.fromkeys(groups)}
        for rows in (known, test)
    ]
    for name, part in [*parts[0].items(), *parts[1].items()]:
        if part.labels.all() or not part.labels.any():
            raise UserValueError(f"group '{name}' needs discovery and test texts of both classes.")
    found = make_report(
        methods,
        *parts,
        folds=options.folds,
        draws=options.draws,
        fractions=options.fractions,
        resamples=options.resamples,
        seed=options.seed,
    )
    for shown in found.tables():
        shown.print()
    write_summary(output, "classify report", vars(options), {**found.to_dict(), "origin": featurizer.origin()})
    facts = {**package_versions(), **machine(), "data": options.data, "model": options.model, "SAEs": options.sae}
    title = f"Feature classifiers on {Path(options.data).name}"
    page = write_html(output / "report.html", title, found.sections(), facts={k: str(v) for k, v in facts.items()})
    status(f"report written to {page}")


def _grouped(options: argparse.Namespace, source: str, split: str) -> tuple[list[str], list[bool], list[str]]:
    """(texts, labels, groups) of a table; one group, called all, without a column of groups."""
    table: Any = read_table(source, split, options.max_texts)
    texts = texts_of(table, options.text_column, source)
    labels = labels_of(table, options.label_column, options.positive, source)
    if options.group_column is None:
        return texts, labels, ["all"] * len(texts)
    return texts, labels, [str(value) for value in column_of(table, options.group_column, source)]


def _parser() -> OptionParser:
    parser = OptionParser(prog="qscope classify")
    actions = parser.add_subparsers(dest="action", required=True)
    new = actions.add_parser("fit", help="learn a classifier from labelled texts")
    _add_learning_options(new)
    new.add_argument("--features", type=int, nargs="+", default=[1], help="a layer; of several, cross-validation picks")
    new.add_argument("--rule", choices=("or", "votes", "logistic"), default="or", help="how features decide")
    new.add_argument("--layer-count", type=int, default=1, help="layers to combine, the best ones by top1-diff")
    new.add_argument("--layer-by", choices=("top1-diff", "validation"), default="top1-diff", help="how one is chosen")
    new.add_argument("--thresholds", choices=("zero", "best"), default="zero", help="above which features fire")
    new = actions.add_parser("predict", help="classify a table, or filter it")
    add_model_options(new)
    add_data_options(new, labels=False)
    add_feature_options(new)
    new.add_argument("--classifier", required=True, help=f"{FILE_NAME}, or the folder that holds it")
    new.add_argument("--score-column", default="score", help="new column: above 0 is positive")
    new.add_argument("--decision-column", default="positive", help="new column: true or false")
    new.add_argument("--drop", choices=("positive", "negative"), help="leave out the rows decided so")
    new.add_argument("--texts-at-once", type=int, default=2000, help="texts whose features are in memory")
    new.add_argument("--output", required=True, help=f"table ({', '.join(WRITERS)}), or folder for load_from_disk")
    new = actions.add_parser("report", help="compare feature classifiers with probes and controls")
    _add_learning_options(new)
    new.add_argument("--group-column", help="column of languages or other groups, learned apart, tested on each other")
    new.add_argument("--test-data", help="another table to test on; else a share of --data")
    new.add_argument("--test-split", default="test", help="of --test-data, if it has several")
    new.add_argument("--test-share", type=float, default=0.2, help="of each group and class, without --test-data")
    new.add_argument("--methods", nargs="+", help="names of methods; all by default")
    new.add_argument("--draws", type=int, default=5, help="parts for each point of the data curve; 0: no curve")
    new.add_argument(
        "--fractions", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0], help="of the data curve"
    )
    new.add_argument("--resamples", type=int, default=1000, help="of the bootstrap over test texts")
    return parser


def _add_learning_options(new: argparse.ArgumentParser) -> None:
    add_model_options(new)
    add_data_options(new)
    add_feature_options(new)
    new.add_argument("--layers", nargs="+", required=True, help="numbers from 0, ranges such as 4-20, or all")
    new.add_argument("--max-length", type=int, default=512, help="tokens of a text at most")
    new.add_argument("--folds", type=int, default=5, help="of the cross-validation on the discovery texts")
    new.add_argument("--seed", type=int, default=0, help="of splits, folds and draws")
    new.add_argument("--output", required=True, help="folder for the results")
