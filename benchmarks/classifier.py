"""Feature classifiers against probes on real text: documentation and everyday speech, in five languages.

The texts are those of `benchmarks/planted_topics.py`: sentences of the React documentation and of Tatoeba,
matched in pairs of the same number of tokens, without digits, symbols and final punctuation. Three tasks: to find
documentation; to find everyday speech, which is the same with the labels exchanged; to find a sentence of documentation
planted beside one of everyday speech. A testbed model and SAEs of all its layers are trained, without labels, on other
text of both kinds. Everything (layers, numbers of features, regularisation) is learned and chosen on the discovery
texts; test texts were seen by nothing before.

    python -m benchmarks.classifier --seeds 0 1 2 --output benchmarks/results

writes classifier_<task>.json (every number) and .svg (F1 over the amount of data). The models are kept in the cache of
the testbed; on one core a model takes some seven minutes, the methods some three, and the curves some five.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.planted_topics import labeled_texts, read_registers, write_pretraining
from benchmarks.testbed.cache import open_cache
from benchmarks.testbed.switching.config import SwitchingConfig
from benchmarks.testbed.switching.features import make_dictionaries
from benchmarks.testbed.switching.language_model import make_language_model
from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer
from qscope_posttrain.analysis.classifier.methods import LabeledTexts, all_methods, collect_examples, methods_named
from qscope_posttrain.analysis.classifier.report import CURVES, TRANSFER, draw_interval, make_report
from qscope_posttrain.provenance import machine, package_versions
from qscope_posttrain.report.plots import Curve, line_curves
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import to_json, write_text
from qscope_posttrain.report.tables import Table

ROOT = Path(__file__).resolve().parents[1]
TASKS: dict[str, tuple[Any, int]] = {
    "documentation": ("documentation", 0),
    "everyday speech": ("speech", 0),
    "planted documentation": ("documentation", 1),
}
"""The positive register, and sentences of the other one beside the one that decides."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    registers = read_registers(options.data, options.languages)
    runs: dict[str, list[dict[str, Any]]] = {task: [] for task in options.tasks}
    models = []
    for seed in options.seeds:
        featurizer, facts = make_featurizer(registers["pretraining"], seed, options)
        models.append({"seed": seed, **facts})
        for task in options.tasks:
            started = time.process_time()
            discovery, test = (
                {name: read_examples(featurizer, registers[role][name], name, task) for name in options.languages}
                for role in ("discovery", "test")
            )
            draws = options.draws if task in options.curves else 0
            methods = all_methods() if options.methods is None else methods_named(options.methods)
            report = make_report(
                methods, discovery, test, folds=options.folds, draws=draws, fractions=options.fractions, seed=seed
            )
            runs[task].append(report.to_dict())
            status(f"seed {seed}, {task}: {time.process_time() - started:.0f} s of processor time")
            for table in report.tables() if options.tables else ():
                table.print()
    for task in options.tasks:
        write_results(task, runs[task], models, options)
    return 0


def write_results(
    task: str, runs: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]], options: argparse.Namespace
) -> None:
    """Print the tables of one task, and write its numbers and its curve."""
    tables = summary_tables(task, runs)
    for table in tables:
        table.print()
    content = to_json(
        {
            "settings": vars(options),
            "models": models,
            "tables": [table.to_dict() for table in tables],
            "runs": runs,
            "versions": package_versions(),
            "machine": machine(),
        }
    )
    path = options.output / f"classifier_{task.replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if runs[0]["curves"]:
        write_text(path.with_suffix(".svg"), curve_figure(runs) + "\n")


def make_featurizer(
    registers: Mapping[str, Any], seed: int, options: argparse.Namespace
) -> tuple[TextFeaturizer, dict[str, Any]]:
    """A model and SAEs of all layers, trained on unlabeled text of both registers."""
    folder = options.cache / "planted_topics"
    folder.mkdir(parents=True, exist_ok=True)
    places = write_pretraining(registers, folder)
    config = SwitchingConfig(
        texts=[f"{language}={place}" for language, place in places.items()],
        target=options.languages[-1],
        identify="words",
        switch=0.0,
        vocabulary=3000,
        sae_layers=4,
        sae_k=16,
        model_seed=seed,
        workers=1,
        cache=str(options.cache),
    )
    cache = open_cache(config)
    language_model = make_language_model(config, cache)
    dictionaries = make_dictionaries(config, cache, language_model)
    facts = {"loss": float(np.mean(language_model.losses[-50:])), "explained": dictionaries.explained_variance}
    status(f"seed {seed}: {facts}")
    return TextFeaturizer(language_model.model, language_model.tokenizer, dictionaries.saes, max_length=96), facts


def read_examples(featurizer: TextFeaturizer, registers: Any, language: str, task: str) -> LabeledTexts:
    """The task in one language. Pairs are matched by this model's own tokens."""

    def length(sentence: str) -> int:
        return len(featurizer.tokenizer(sentence)["input_ids"])

    positive, background = TASKS[task]
    found = labeled_texts(registers, language, length, seed=0, positive=positive, background=background)
    return collect_examples(featurizer, found.texts, found.labels)


def summary_tables(task: str, runs: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Means over languages, with t intervals over the models."""
    languages = list(runs[0]["sizes"])
    methods = list(runs[0]["evaluations"])

    def values(method: str, metric: str, source: str, target: str) -> list[float]:
        found = [run["evaluations"][method][source][target][metric][0] for run in runs]
        return [float("nan") if value is None else value for value in found]

    def own(method: str, metric: str) -> Any:
        return np.mean([values(method, metric, name, name) for name in languages], axis=0)

    probe = own("logistic on the residual", "f1")
    rows, moved = [], []
    for method in methods:
        against = "-" if method == "logistic on the residual" else spread(own(method, "f1") - probe, signed=True)
        f1 = own(method, "f1")
        by_language = [f"{np.mean(values(method, 'f1', name, name)):.3f}" for name in languages]
        rest = [spread(own(method, metric)) for metric in ("tpr_at_1", "tpr_at_5", "auroc")]
        rows.append([method, spread(f1), against, *rest, *by_language])
        if method in TRANSFER:
            away = {
                one: np.mean([values(method, "f1", one, two) for two in languages if two != one], axis=0)
                for one in languages
            }
            auroc = np.mean(
                [values(method, "auroc", one, two) for one in languages for two in languages if two != one], axis=0
            )
            mean = np.mean(list(away.values()), axis=0)
            moved.append([method, spread(mean), spread(auroc), *(f"{np.mean(v):.3f}" for v in away.values())])
    models = f"95 % t intervals over {len(runs)} models, each with its own SAEs" if len(runs) > 1 else "one model"
    caption = f"Mean over {len(languages)} languages; {models}."
    columns = ["method", "F1", "against the probe", "TPR at FPR 1 %", "TPR at 5 %", "AUROC"]
    tables = [
        Table(f"{task.capitalize()}: learned and tested on one language", [*columns, *languages], rows, caption),
        Table(
            f"{task.capitalize()}: tested on the four other languages",
            ["method", "F1", "AUROC", *(f"F1 from {name}" for name in languages)],
            moved,
            caption,
        ),
    ]
    overlap = [
        [int(layer), spread(np.array([np.mean(list(run["jaccard"][layer].values())) for run in runs]))]
        for layer in runs[0]["jaccard"]
    ]
    title = f"{task.capitalize()}: overlap of the top 10 features between languages"
    tables.append(Table(title, ["layer", "mean Jaccard over pairs"], overlap, caption))
    chosen, best = [], []
    for run in runs:
        for name in languages:
            layers = [row for row in run["layers"][name] if row["k"] == 1]
            chosen.append(next(row["f1"] for row in layers if row["layer"] == run["chosen_layers"][name]))
            best.append(max(row["f1"] for row in layers))
    title = f"{task.capitalize()}: one feature, which layer"
    rows = [
        ["top1-diff, from discovery texts", np.mean(chosen)],
        ["best on the test texts: no estimate", np.mean(best)],
    ]
    return [*tables, Table(title, ["layer by", "F1, K = 1"], rows, f"Mean over {len(runs)} models x languages.")]


def curve_figure(runs: Sequence[Mapping[str, Any]]) -> str:
    """F1 over the share of the discovery texts: mean over languages and draws, band over models."""
    shares: list[str] = list(next(iter(runs[0]["curves"].values()))[CURVES[0]])
    x = [100 * float(share) for share in shares]
    curves = []
    for method in CURVES:
        points = [
            draw_interval([np.mean([np.mean(of[method][share]) for of in run["curves"].values()]) for run in runs])
            for share in shares
        ]
        low, high = ([getattr(point, side) for point in points] for side in ("low", "high"))
        curves.append(Curve(method, x, [point.estimate for point in points], low, high))
    return line_curves(curves, "discovery texts, %", "F1 on test texts", x_marks=x)


def spread(values: Any, signed: bool = False) -> str:
    """Mean and t interval over the models."""
    sample = np.asarray(values, dtype=np.float64)
    if np.isnan(sample).any():
        return "-"
    mark = "+" if signed else ""
    if len(sample) == 1:
        return f"{sample[0]:{mark}.3f}"
    reach = stats.t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample))
    mean = sample.mean()
    return f"{mean:{mark}.3f} ({mean - reach:{mark}.3f} .. {mean + reach:{mark}.3f})"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--languages", nargs="+", default=["en", "fr", "ko", "ru", "zh"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--curves", nargs="*", choices=list(TASKS), default=["documentation"], help="tasks with a curve"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the models")
    parser.add_argument("--methods", nargs="+", help="names of methods; all by default")
    parser.add_argument("--draws", type=int, default=3, help="parts drawn for each point of the curve; 0: no curve")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.01, 0.03, 0.1, 0.3, 1.0], help="of the curve")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--tables", action="store_true", help="print the tables of every model")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "qscope_posttrain" / "testbed")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
