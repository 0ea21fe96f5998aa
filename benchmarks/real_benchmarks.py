"""Section 4 of the Qwen-Scope report on real items: GSM8K, MGSM in four languages, HumanEval, and plain sentences.

A small model and its SAEs are trained on documentation in five languages (React's; nothing of any benchmark is in it),
written as files, and analysed with `qscope analyze` like any other model. Three questions are put:

* the items as they are, last token (the report's form);
* the items inside one prompt with a common ending, so that the last token itself tells nothing apart;
* a panel of models, of three mixtures of languages and two lengths of training, scored item by item on which of four
  orders of words is the item's own (see own_order.py), for what features and performance have in common.

Run with

    python -m benchmarks.real_benchmarks [--steps 500] [--output benchmarks/results/real_benchmarks]
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.own_order import correct_orders
from benchmarks.testbed.cache import Cache, default_cache_folder
from benchmarks.testbed.models import save_model
from benchmarks.testbed.switching.config import SwitchingConfig
from benchmarks.testbed.switching.features import make_dictionaries
from benchmarks.testbed.switching.language_model import make_language_model
from qscope_posttrain.analysis.benchmarks.items import ItemSource, read_items
from qscope_posttrain.cli.main import main as qscope

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RECIPE = ROOT / "recipes" / "analysis" / "real_benchmarks.yaml"
SENTENCES = {"en": 300, "fr": 200, "ko": 100, "ru": 150, "zh": 120}
"""Plain sentences of Tatoeba, as further sets of items for the panel"""
PANEL_ITEMS = {"gsm8k": 400, "mgsm-en": 250, "mgsm-fr": 180, "mgsm-ru": 140, "mgsm-zh": 220}
"""Number of items of these that the panel reads, the first ones: many models cost many passes."""
MIXTURES = {"all": ("en", "fr", "ko", "ru", "zh"), "en-zh": ("en", "zh"), "en-fr-ru": ("en", "fr", "ru")}
"""Languages of the panel's models; the last one only decides on a script that the others must not contain"""
PANEL = {"hidden_size": 64, "model_layers": 2, "sae_layers": 1, "pretraining_batch_size": 8}
"""The panel's models are smaller than the one under analysis."""
PROMPT = "{text}\n\nTo find the answer,"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not DATA.is_dir():
        print(f"the benchmark items are not there: {DATA} does not exist", file=sys.stderr)
        return 2
    work = options.work
    cache = Cache(default_cache_folder())
    started = time.process_time()
    places = train(options, cache, work)
    sources = item_sources(work)
    if not options.only or {"redundancy", "similarity"} & set(options.only):
        score_panel(options, cache, sources, work / "correct")
    common = ["--model", str(places["model"]), "--sae", str(places["sae"]), "--k", str(options.k)]
    plain, every = str(RECIPE), str(work / "all.yaml")
    runs = {
        "as_they_are": ["overlap", "--benchmarks", plain, "--layers", "all", "--token-control"],
        "common_ending": ["overlap", "--benchmarks", plain, "--layers", "all", "--prompt", PROMPT],
        "coverage": ["redundancy", "--benchmarks", plain, "--layers", "2"],
        "redundancy": ["redundancy", "--benchmarks", every, "--layers", "2", "--correctness", str(work / "correct")],
        "similarity": ["overlap", "--benchmarks", every, "--layers", "2", "--correctness", str(work / "correct"),
                       "--control", "sentences-en"],
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    for name, words in runs.items():
        if options.only and name not in options.only:
            continue
        if status := qscope(["analyze", *words, *common, "--output", str(work / name)]):
            return status
        shutil.copyfile(work / name / "summary.json", options.output / f"{name}.json")
        print(f"report with curves and heat maps: {work / name / 'report.html'}")
    print(f"{time.process_time() - started:.0f} s of processor time; results in {options.output}")
    return 0


def train(options: argparse.Namespace, cache: Cache, work: Path) -> dict[str, Path]:
    """The model under analysis and an SAE for each of its layers, as files."""
    config = config_of(options, "all", options.steps, sae_layers=4, sae_k=options.k, sae_expansion=16,
                       sae_steps=300, sae_windows=1500)  # fmt: skip
    if options.keep_model and (work / "model.json").is_file():
        return {"model": work / "model", "sae": work / "sae"}
    language_model = make_language_model(config, cache)
    dictionaries = make_dictionaries(config, cache, language_model)
    save_model(language_model.model, language_model.tokenizer, work / "model")
    (work / "sae").mkdir(parents=True, exist_ok=True)
    for layer in dictionaries.saes:
        shutil.copyfile(dictionaries.folder / f"layer{layer}.sae.pt", work / "sae" / f"layer{layer}.sae.pt")
    facts = {
        "text": "React documentation in en, fr, ko, ru, zh: no item of a benchmark",
        "steps": options.steps,
        "last_losses": language_model.losses[-20:],
        "explained_variance": dictionaries.explained_variance,
        "d_model": config.hidden_size,
        "d_sae": 16 * config.hidden_size,
        "k": options.k,
    }
    (work / "model.json").write_text(json.dumps(facts, indent=2) + "\n")
    options.output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / "model.json", options.output / "model.json")
    return {"model": work / "model", "sae": work / "sae"}


def item_sources(work: Path) -> dict[str, ItemSource]:
    """The recipe's benchmarks and the sentences, also written to `all.yaml`."""
    entries: dict[str, dict[str, Any]] = yaml.safe_load(RECIPE.read_text())
    for language, count in SENTENCES.items():
        lines = (DATA / "tatoeba" / f"{language}.txt").read_text(encoding="utf-8").splitlines()
        # Short sentences have no two halves to tell apart.
        kept = sorted(range(len(lines)), key=lambda row: -len(lines[row]))[:count]
        path = work / f"sentences-{language}.jsonl"
        path.write_text("".join(json.dumps({"text": lines[row]}) + "\n" for row in sorted(kept)))
        entries[f"sentences-{language}"] = {"source": str(path), "field": "text"}
    for name, limit in PANEL_ITEMS.items():
        entries[name]["limit"] = limit
    (work / "all.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    return {name: ItemSource(name=name, **{**entry, "field": str(entry["field"])}) for name, entry in entries.items()}


def score_panel(options: argparse.Namespace, cache: Cache, sources: Mapping[str, ItemSource], folder: Path) -> None:
    """`<benchmark>.csv`: a column a model, a row an item, 1 where it prefers the item's own order of words."""
    texts = {name: read_items(source).texts for name, source in sources.items()}
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in texts}
    for mixture in MIXTURES:
        for steps in options.panel_steps:
            language_model = make_language_model(config_of(options, mixture, steps, **PANEL), cache)
            for name, items in texts.items():
                correct = correct_orders(language_model.model, language_model.tokenizer, items)
                found[name][f"{mixture}-{steps}"] = correct
            scores = ", ".join(f"{name} {found[name][f'{mixture}-{steps}'].mean():.2f}" for name in texts)
            print(f"{mixture} after {steps} steps: {scores}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in found.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            writer.writerows(np.stack(list(columns.values()), axis=1).astype(int).tolist())


def config_of(options: argparse.Namespace, mixture: str, steps: int, **changes: Any) -> SwitchingConfig:
    languages = MIXTURES[mixture]
    return SwitchingConfig(
        corpus=str(DATA / "react_docs"), languages=list(languages), target=languages[-1], switch=0.0, vocabulary=3000,
        window=128, pretraining_steps=steps, workers=options.workers, **changes,
    )  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps of the model under analysis")
    parser.add_argument("--panel-steps", type=int, nargs="+", default=[400, 1600])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="processes that train a model")
    parser.add_argument("--keep-model", action="store_true", help="take the model of an earlier run from --work")
    parser.add_argument("--only", nargs="+", help="some of the five analyses")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "real_benchmarks")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "real_benchmarks")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
