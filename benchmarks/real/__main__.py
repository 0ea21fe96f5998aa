"""Studies on two pretrained models, SmolLM2-135M-Instruct and Gemma 3 270M, on real text. Run by `make real`:

    make real                    # everything, on two cores some hours
    make real QUICK=1            # the whole chain on SmolLM2 with few texts, to see that it runs
    make real ONLY="loops hate_speech"  # some studies

Steps that ran before on the same files are not run again. Models, SAEs and logs stay in `--work`; the numbers go to
`--output`, from which docs/results/real_models.md is made.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real.pretrained import MODELS, Pretrained, converted
from benchmarks.real.steps import ROOT, run_step
from benchmarks.real.texts import DOCUMENTATION, paragraphs, sae_texts
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import write_text


@dataclass(frozen=True)
class Study:
    """One study: a module of studies/ with `run(options)`."""

    models: tuple[str, ...]
    saes: bool
    """Whether it needs SAEs of the model"""
    code: tuple[str, ...] = ()
    """Files and folders beside this one that belong to it: where they change, it is run again"""


STUDIES = {
    "loops": Study(("smollm2",), saes=False),
    "switching": Study(("gemma3",), saes=False),
    "steering": Study(("smollm2", "gemma3"), saes=True, code=("steering_probe.py",)),
    "explaining": Study(("smollm2",), saes=True, code=("stand_ins.py",)),
    "hate_speech": Study(("smollm2", "gemma3"), saes=True),
    "sasft": Study(("gemma3",), saes=True, code=("fine_tuning",)),
    "negatives": Study(("smollm2",), saes=True, code=("loop_measures.py", "sums.py")),
    "overlap": Study(("smollm2", "gemma3"), saes=True, code=("panel",)),
}
"""In the order in which they run"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    for model in (MODELS[name] for name in options.model):
        folder = converted(model.name, options.models)
        studies = [study for study in options.only if model.name in STUDIES[study].models]
        if any(STUDIES[study].saes for study in studies):
            train_saes(model, folder, options)
        for study in studies:
            run_study(study, model, folder, options)
    status(f"results in {options.output}")
    return 0


def train_saes(model: Pretrained, folder: Path, options: argparse.Namespace) -> None:
    """Train the SAEs of a model, and check them on held-out paragraphs."""
    name, work = f"{model.name}_saes", options.work
    texts, held_out = work / "texts" / f"{model.name}.jsonl", work / "texts" / model.name
    held_out.mkdir(parents=True, exist_ok=True)
    write_text(texts, "".join(json.dumps({"text": text}) + "\n" for text in sae_texts(model.name)))
    for language in DOCUMENTATION[model.name]:
        write_text(held_out / f"{language}.txt", "\n".join(paragraphs(language, held_out=True)[:100]) + "\n")
    recipe = Path("recipes") / "real" / f"train_sae_{model.name}.yaml"  # steps run in the root of the repository
    saes, checked = work / "saes" / model.name, work / "checks" / model.name
    train = ["sae", "train", "--config", recipe, "--model", folder, "--texts", texts, "--output", saes]
    check = ["sae", "check", saes, "--model", folder, "--layer", *model.layers, "--texts", held_out, "--scan", 0]
    check += ["--max-texts", 5 if options.quick else 20]  # of each language
    shorter = ["--steps", 20, "--held_out_documents", 4] if options.quick else []
    for step, words, reads, output in (
        (name, [*train, *shorter], [folder, texts, ROOT / recipe], saes),
        (f"{name}_check", [*check, "--output", checked], [folder, saes, held_out], checked),
    ):
        ran = run_step(step, ["qscope_posttrain", *map(str, words)], reads, work)
        keep(step, json.loads((output / "summary.json").read_text(encoding="utf-8"))["results"], ran, options.output)


def run_study(study: str, model: Pretrained, folder: Path, options: argparse.Namespace) -> None:
    """Run one study of one model, and keep its result."""
    name, saes = f"{model.name}_{study}", options.work / "saes" / model.name
    result, own = options.work / "results" / f"{name}.json", options.work / name
    words: list[object] = [study, "--model", folder, "--work", own, "--output", result]
    code = (f"studies/{study}.py", "texts.py", *STUDIES[study].code)
    reads = [folder, *(Path(__file__).parent / name for name in code)]
    if STUDIES[study].saes:
        words += ["--saes", saes, "--layers", *model.layers]
        reads.append(saes)
    if options.quick:
        words.append("--quick")
    ran = run_step(name, ["benchmarks.real.study", *map(str, words)], reads, options.work)
    keep(name, json.loads(result.read_text(encoding="utf-8")), ran, options.output)


def keep(name: str, result: Mapping[str, Any], ran: Mapping[str, Any], folder: Path) -> None:
    """Write one result with what it took."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**{key: value for key, value in ran.items() if key != "key"}, **result}
    write_text(folder / f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the whole chain on SmolLM2 with few texts")
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES), help="some studies")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), help="some models (default: all; quick: smollm2)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "real", help="models, SAEs, logs (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the numbers (default: benchmarks/results/real; quick: WORK)"
    )
    options = parser.parse_args(arguments)
    options.models = options.work
    options.model = options.model or (["smollm2"] if options.quick else list(MODELS))
    if options.quick:
        options.work = options.work / "quick"  # quick results are never mixed with the others
    options.output = options.output or (options.work if options.quick else ROOT / "benchmarks" / "results" / "real")
    return options


if __name__ == "__main__":
    sys.exit(main())
