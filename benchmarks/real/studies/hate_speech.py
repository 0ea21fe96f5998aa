"""Study 5: find hateful test cases of HateCheck in eleven languages by SAE features, against probes and words.

Both classes are equally frequent, and no template is in both discovery and test, in no language. All methods of
`qscope classify report` are fitted per language, and those of one language are tested on all the others.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.classifier import spread
from benchmarks.real.texts import HATECHECK, HateCase, hate_cases, split_by_template
from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer
from qscope_posttrain.analysis.classifier.methods import LabeledTexts, collect_examples, methods_named
from qscope_posttrain.analysis.classifier.report import CURVES, REFERENCE, efficiency, make_report
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

METHODS = (
    "OR, layer by top1-diff", "OR, layer by validation", "OR, best thresholds", "logistic on top features",
    "random features, OR", "logistic on all features", "logistic on the residual", "difference of means",
    "bag of tokens", "length", "always positive",
)  # fmt: skip
EUROPEAN = ("de", "en", "es", "fr", "it", "nl", "pl", "pt")
FRACTIONS = (0.03, 0.1, 0.3, 1.0)
DISCOVERY, TEST = 300, 100
"""Test cases per class and language"""


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        return study(options.model, options.saes, options.layers, ("en", "fr"), seeds=1, draws=0)
    return study(options.model, options.saes, options.layers)


def study(model: Path, saes: Path, layers: Sequence[int], languages: Sequence[str] = HATECHECK, seeds: int = 3,
          draws: int = 3) -> dict[str, Any]:  # fmt: skip
    """A report as of `qscope classify report` per split of the templates, and the data curve in English."""
    loaded, tokenizer = load_model(str(model), dtype="float32", device="cpu")
    dictionaries = {layer: SparseAutoencoder.load(saes, layer=layer) for layer in layers}
    featurizer = TextFeaturizer(loaded, tokenizer, dictionaries, max_length=96)
    splits = [{language: draw(language, seed) for language in languages} for seed in range(seeds)]
    known = {language: read(featurizer, [split[language] for split in splits]) for language in languages}
    runs, curves = [], []
    for seed, split in enumerate(splits):
        discovery, test = ({lang: take(known[lang], split[lang][part]) for lang in languages} for part in (0, 1))
        runs.append(make_report(methods_named(METHODS), discovery, test, folds=3, draws=0, seed=seed).to_dict())
        if draws:
            curves.append(efficiency(methods_named(CURVES), discovery["en"], test["en"], fractions=FRACTIONS,
                                     draws=draws, folds=3, seed=seed))  # fmt: skip
    return summary({"languages": list(languages), "layers": list(layers), "runs": runs, "curves": curves})


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """The tables, and of each split F1 and AUROC of every method from each language to each."""
    pairs = [
        {
            method: {
                one: {two: [_rounded(row["f1"][0]), _rounded(row["auroc"][0])] for two, row in to.items()}
                for one, to in found.items()
            }
            for method, found in run["evaluations"].items()
        }
        for run in result["runs"]
    ]
    shown = {name: table.to_dict() for name, table in tables(result).items()}
    return {"tables": shown, "f1_and_auroc": pairs, "english_f1_by_share": result["curves"]}


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else round(value, 4)


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of a page: every method in its own language, learned in English alone, and by layer; means over the
    splits of the templates, with 95 % t intervals over them."""
    runs, languages = result["runs"], result["languages"]
    away = [language for language in languages if language != "en"]

    def over_splits(method: str, metric: str, pairs: Sequence[tuple[str, str]]) -> Any:
        found = [[run["evaluations"][method][one][two][metric][0] for one, two in pairs] for run in runs]
        return np.array([[np.nan if value is None else value for value in row] for row in found]).mean(axis=1)

    own = [(language, language) for language in languages]
    rows, moved = [], []
    for method in runs[0]["evaluations"]:
        against = over_splits(method, "f1", own) - over_splits(REFERENCE, "f1", own)
        cells = [
            spread(over_splits(method, metric, pairs)) for pairs in (own, [("en", "en")]) for metric in ("f1", "auroc")
        ]
        rows.append([method, *cells, "-" if method == REFERENCE else spread(against, signed=True)])
        values = [over_splits(method, "f1", [("en", language)]).mean() for language in ("en", *away)]
        mean = spread(over_splits(method, "f1", [("en", language) for language in away])) if away else "-"
        moved.append([method, *(f"{value:.2f}" for value in values), mean])
    caption = f"Means over {len(languages)} languages and {len(runs)} splits; 95 % t intervals over splits."
    layers = []
    for layer in map(str, result["layers"]):
        f1 = [
            row["f1"]
            for run in runs
            for name in languages
            for row in run["layers"][name]
            if (str(row["layer"]), row["k"]) == (layer, 1)
        ]
        chosen = [str(run["chosen_layers"][name]) == layer for run in runs for name in languages]
        overlap: dict[str, list[float]] = {"european": [], "others": []}
        for run in runs:
            for pair, value in {str(key): row for key, row in run["jaccard"].items()}.get(layer, {}).items():
                overlap["european" if set(pair.split("/")) <= set(EUROPEAN) else "others"].append(value)
        means = [f"{np.mean(values):.3f}" if values else "-" for values in overlap.values()]
        layers.append([int(layer), f"{np.mean(f1):.3f}", f"{np.mean(chosen):.0%}", *means])
    columns = ["method", "F1", "AUROC", "F1, English", "AUROC, English", "F1 against the probe"]
    methods = Table("Hateful test cases, each language by itself", columns, rows, caption)
    columns = ["method", "en", *away, "mean of the others"]
    caption = f"Means over {len(runs)} splits; 95 % t interval over splits."
    transfer = Table("Learned on English, tested on each language: F1", columns, moved, caption)
    columns = ["layer", "F1 of one feature", "chosen by top1-diff", "overlap, European pairs", "overlap, other pairs"]
    caption = "Overlap: |A and B| / |A or B| of the ten features with the largest difference in firing rate."
    return {"methods": methods, "transfer": transfer, "layers": Table("Layers", columns, layers, caption)}


Drawn = tuple[list[HateCase], list[HateCase]]
Known = tuple[LabeledTexts, dict[HateCase, int]]


def draw(language: str, seed: int) -> Drawn:
    """(discovery, test) of a language, both classes alike, test cases of as many templates as there are."""
    parts = split_by_template(hate_cases(language), seed)
    return _balanced(parts[0], DISCOVERY, seed), _balanced(parts[1], TEST, seed)


def read(featurizer: TextFeaturizer, splits: Sequence[Drawn]) -> Known:
    """All cases of several splits in one pass of the model, and the row of each."""
    cases = list(dict.fromkeys(case for split in splits for part in split for case in part))
    texts = collect_examples(featurizer, [case.text for case in cases], [case.hateful for case in cases])
    return texts, {case: row for row, case in enumerate(cases)}


def take(known: Known, cases: Sequence[HateCase]) -> LabeledTexts:
    """The rows of some cases."""
    texts, rows = known
    return texts.take([rows[case] for case in cases])


def _balanced(cases: Sequence[HateCase], count: int, seed: int) -> list[HateCase]:
    """`count` cases of each class: first one of each template, then a second one, and so on."""
    order = list(cases)
    random.Random(seed).shuffle(order)
    seen: dict[str, int] = {}
    rank: dict[HateCase, int] = {}
    for case in order:
        rank[case] = seen[case.template] = seen.get(case.template, -1) + 1
    chosen: list[HateCase] = []
    for hateful in (True, False):
        chosen += sorted((case for case in rank if case.hateful == hateful), key=rank.__getitem__)[:count]
    return chosen
