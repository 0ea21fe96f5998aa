"""Study 5: find hateful test cases of HateCheck in eleven languages by SAE features, against probes and words.

Both classes are equally frequent, and no template is in both discovery and test, in no language. All methods of
`qscope classify report` are fitted per language, and those of one language are tested on all the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real.texts import HATECHECK, HateCase, hate_cases, split_by_template
from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer
from qscope_posttrain.analysis.classifier.methods import LabeledTexts, collect_examples, methods_named
from qscope_posttrain.analysis.classifier.report import CURVES, efficiency, make_report
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

METHODS = (
    "OR, layer by top1-diff", "OR, layer by validation", "OR, best thresholds", "logistic on top features",
    "random features, OR", "logistic on all features", "logistic on the residual", "difference of means",
    "bag of tokens", "length", "always positive",
)  # fmt: skip
FRACTIONS = (0.03, 0.1, 0.3, 1.0)
DISCOVERY, TEST = 300, 100
"""Test cases per class and language"""


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
    return {"languages": list(languages), "layers": list(layers), "runs": runs, "curves": curves}


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
