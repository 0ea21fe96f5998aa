"""Study 3: loops of a real chat model, steered and seeded, and what negatives made of them teach it.

The model's own greedy loops give repetition features (`qscope features find-repetition`, with its dose curve and random
directions). DAPO then trains the model on sums that it half knows, with and without negatives (`qscope grpo`). What
changes is measured on prompts of another kind: greedy loops, whether seeded loops go on, and teacher-forced probes.
Every part is a step of its own: an interrupted study goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.real import loop_measures, sums
from benchmarks.real.page import shown
from benchmarks.real.steps import ROOT, run_step
from benchmarks.real.sums import write_prompts
from qscope_posttrain.features.dose_curve import MEANS, RANDOM
from qscope_posttrain.intervals import bootstrap_difference, wilson
from qscope_posttrain.report.summary import to_json, write_text
from qscope_posttrain.report.tables import Table

SIZES = {"finding": (24, 40), "held-out": (16, 32)}
"""Word problems and instructions of each part"""
FIND, GRPO = "recipes/real/find_repetition_smollm2.yaml", "recipes/real/grpo_smollm2.yaml"
STRONGER = ["--steering_strength", "1.2"]
"""The curve's own choice of 0.6 makes an eighth of the rows loop; the others would be dropped."""
ARMS: dict[str, tuple[str, list[str]]] = {
    "dapo": ("DAPO", ["--negatives_per_group", "0"]),
    "seeded": ("seeded negative", ["--negative", "seeded"]),
    "light": ("seeded negative, weight 0.25", ["--negative", "seeded", "--negative_weight", "0.25"]),
    "feature": ("steered by features", ["--negative", "feature", "--features", "FEATURES", *STRONGER]),
    "random": ("steered at random", ["--negative", "random", "--features", "FEATURES", *STRONGER]),
    "paper": ("steered, the report's form", ["--mode", "paper", "--features", "FEATURES"]),
}
"""Arm -> its name in tables, and what `qscope grpo` is told beside the recipe"""
START, REFERENCE = "start", "dapo"
PROBED = (("own loops", 1), ("open text", 1), ("open text", 2), ("open text", 4), ("sums", 2))
"""Places at which the probability of a further copy is measured, and how many stand there"""
WAYS = ("greedy", "temperature 0.7")
PAIRS = (("feature", "random"), ("seeded", "feature"), ("light", "seeded"))
COSTS = ("seconds", "processor_seconds", "peak_mib", "command")
LOGGED = (
    *(f"ordinary/{name}" for name in ("reward", "length", "repeat_ratio", "zero_std_groups")),
    *(f"negative/{name}" for name in ("rows", "looped", "kept", "advantage", "gradient_share", "log_ratio")),
)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All steps, those that ran before on the same files aside, and what they found."""
    arms = list(ARMS)[:2] if options.quick else list(ARMS)
    run_steps(options, (START, "features", *arms))
    return collect(options.work, [START, *arms])


def run_steps(options: argparse.Namespace, wanted: Sequence[str]) -> None:
    """The steps of the parts `wanted`: "start" (the model's own loops, and all measures of it), "features", or arms,
    in this order. Each is a process of its own."""
    work, model = options.work, options.model
    sizes = {part: (2, 6) if options.quick else size for part, size in SIZES.items()}
    write_prompts(work, sizes, tests=8 if options.quick else 86)
    greedy = ["evaluate", "repetition", "--chat", "--temperature", 0, "--samples", 1, "--batch-size", 64,
              "--max-new-tokens", 160 if options.quick else 256]  # fmt: skip

    def step(name: str, words: Sequence[object], reads: Sequence[Path], module: str = "qscope_posttrain") -> None:
        run_step(name, [module, *map(str, words)], reads, work)

    def measured(name: str, folder: Path) -> None:
        """Greedy loops of a model on held-out prompts, and the probes."""
        prompts = work / "held-out.jsonl"
        output = work / f"{name}_greedy"
        words = ["--model", folder, "--prompts", prompts, "--output", output]
        step(f"{name}_greedy", [*greedy, *words], [folder, prompts])
        words = ["--model", folder, "--start", model, "--work", work, "--output", work / f"{name}.json"]
        reads = [folder, work / "loops", work / f"{START}_greedy", work / "test.jsonl", Path(loop_measures.__file__)]
        words += ["--sampled"] * (name == START) + ["--quick"] * options.quick
        step(f"{name}_probes", words, reads, "benchmarks.real.loop_measures")

    features = work / "features"
    if START in wanted:
        prompts = work / "finding.jsonl"
        step("loops", [*greedy, "--model", model, "--prompts", prompts, "--output", work / "loops"], [model, prompts])
        measured(START, model)
    if "features" in wanted:
        loops, curve = work / "loops" / "examples.jsonl", work / "curve.jsonl"
        words = ["features", "find-repetition", "--config", FIND, "--model", model, "--sae", options.saes,
                 "--loops", loops, "--prompts", curve, "--output", features,
                 "--layers", *options.layers[: 1 if options.quick else None]]  # fmt: skip
        if options.quick:
            words += ["--strengths", 1, "--samples", 4, "--fresh-samples", 8, "--top", 1]
        step("features", words, [model, options.saes, ROOT / FIND, loops, curve])
    for arm in (arm for arm in wanted if arm in ARMS):
        given = [str(features) if word == "FEATURES" else word for word in ARMS[arm][1]]
        data, folder = work / "train.jsonl", work / arm
        words = ["grpo", "--config", GRPO, "--allow-code", "--model_name_or_path", model, "--dataset_name", data,
                 "--output_dir", folder, *given]  # fmt: skip
        if options.quick:
            words += ["--max_steps", 1]
        reads = [model, ROOT / GRPO, data, Path(sums.__file__), *([features] if str(features) in given else [])]
        step(arm, words, reads)
        measured(arm, folder)


def collect(work: Path, arms: Sequence[str]) -> dict[str, Any]:
    """The numbers of the study from the files of its steps, and its tables."""
    found = {arm: json.loads((work / f"{arm}.json").read_text(encoding="utf-8")) for arm in arms}
    for arm in arms:
        examples = loop_measures.read(work / f"{arm}_greedy" / "examples.jsonl")
        found[arm]["greedy"] = {key: [row[key] for row in examples] for key in ("endless", "ended", "tokens")}
    steered = json.loads((work / "features" / "summary.json").read_text(encoding="utf-8"))["results"]
    loops = json.loads((work / "loops" / "summary.json").read_text(encoding="utf-8"))["results"]
    logs = {}
    for arm in (arm for arm in arms if arm != START):
        log = json.loads((work / arm / "summary.json").read_text(encoding="utf-8"))["results"]["log"]
        logs[arm] = [{key: row[key] for key in LOGGED if key in row} for row in log if "loss" in row]
    tables = {
        "start": start_table(found[START]),
        "steering": steering_table(steered["steering_curve"]),
        "training": training_table(logs),
        "loops": loops_table(found),
        "copies": copies_table(found),
        "pairs": pairs_table(found),
    }
    costs = {name: {key: step[key] for key in COSTS} for name, step in steps_of(work).items()}
    kept = {key: steered[key] for key in ("ranking", "steering", "steering_curve", "loops")}
    first = {key: loops[key] for key in ("ratio", "prompts", "samples", "note") if key in loops}
    return {
        "tables": {name: table.to_dict() for name, table in tables.items()},
        "found_on": first, "features": kept, "training": logs, "measured": found, "steps": costs,
    }  # fmt: skip


def steps_of(work: Path) -> dict[str, dict[str, Any]]:
    """What is known about the steps that were run."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((work / "steps").glob("*.json"))}


def start_table(own: Mapping[str, Any]) -> Table:
    """How readily the model goes on with a loop before any training."""
    rows: list[list[Any]] = []
    for kind, places in own["copies"].items():
        going = [f"{100 * fmean(probability(places, copies)):.0f}" for copies in range(1, loop_measures.COPIES)]
        drawn = {name.removeprefix(f"{kind}, "): ended for name, ended in own["endless"].items() if kind in name}
        rates = [rate(sum(drawn[way]), len(drawn[way])) if way in drawn else "-" for way in WAYS]
        rows.append([kind, len(places), f"{fmean(own['blocks'][kind]):.0f}", *going, *rates])
    after = [f"after {copies}, %" for copies in range(1, loop_measures.COPIES)]
    columns = ["text", "places", "tokens of a copy", *after, *(f"never ends, {way}, %" for way in WAYS)]
    caption = (
        "after k: probability per token of a further copy when k stand there. never ends: repeats to the limit of 64 "
        f"further tokens after {loop_measures.SEEDED} copies, with 95 % Wilson intervals."
    )
    return Table("Before training: does a loop go on?", columns, rows, caption)


def steering_table(curve: Mapping[str, Any]) -> Table:
    """Loops by layer and strength: the best direction of features, random ones and the difference of means."""
    points = [dict(zip(curve["columns"], row, strict=True)) for row in curve["rows"]]
    rows: list[list[Any]] = []
    steered = [point for point in points if point["layer"] is not None]
    for stage, layer, strength in dict.fromkeys((p["stage"], p["layer"], p["strength"]) for p in steered):
        here = [p for p in steered if (p["stage"], p["layer"], p["strength"]) == (stage, layer, strength)]
        features = [p for p in here if not p["direction"].startswith((RANDOM, MEANS))]
        best = max(features, key=lambda point: (point["looped"], -point["strength"]))
        others = [next(p for p in here if p["direction"].startswith(kind)) for kind in (RANDOM, MEANS)]
        cells = [rate(round(p["looped"] * p["n"]), p["n"]) for p in (best, *others)]
        unlikely = next(best[name] for name in best if name.startswith("p <"))
        rows.append([stage, layer, strength, best["n"], best["direction"], *cells, f"{100 * unlikely:.0f}"])
    unsteered = [p for p in points if p["layer"] is None]
    none = ", ".join(f"{rate(round(p['looped'] * p['n']), p['n'])} ({p['stage']})" for p in unsteered)
    columns = ["stage", "layer", "strength", "samples", "best direction of features", "features loop, %",
               "random directions loop, %", "difference of means loops, %", "unlikely tokens, %"]  # fmt: skip
    caption = (
        f"With 95 % Wilson intervals; in the scan the best of several directions looks better than it is. Without "
        f"steering: {none}. Strength in median residual norms, on 16 tokens. Unlikely: p < 0.001 without steering."
    )
    return Table("Steering the model into endless repetition", columns, rows, caption)


def training_table(logs: Mapping[str, Sequence[Mapping[str, Any]]], part: int = 5) -> Table:
    """What the trainer logged in the first and in the last updates."""

    def mean(entries: Sequence[Mapping[str, Any]], name: str) -> float | None:
        values = [entry[name] for entry in entries if entry.get(name) is not None]
        return fmean(values) if values else None

    rows: list[list[Any]] = []
    for arm, log in logs.items():
        first, last = log[:part], log[-part:]
        numbers = [mean(entries, "ordinary/reward") for entries in (first, last)]
        numbers += [mean(log, "ordinary/repeat_ratio"), mean(last, "ordinary/length")]
        made = [(entry["negative/rows"], entry["negative/kept"]) for entry in log if entry.get("negative/rows")]
        kept = f"{sum(count * share for count, share in made):.0f} of {sum(count for count, _ in made):.0f}"
        looped = [mean(entries, "negative/looped") for entries in (first, last)]
        rows.append([ARMS[arm][0], *numbers, *looped, kept if made else "-", mean(log, "negative/gradient_share")])
    columns = ["arm", "reward, first", "last", "ordinary rows that loop", "their length, last",
               "negatives that loop, first", "last", "kept", "share of the gradient"]  # fmt: skip
    caption = f"first, last: means over {part} updates; the others over all. Lengths in tokens."
    return Table("Training", columns, rows, caption)


def loops_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Accuracy, greedy loops and seeded loops, with differences to DAPO over the same prompts."""
    rows: list[list[Any]] = []
    for arm, own in found.items():
        cells: list[Any] = []
        for name in outcomes(found[REFERENCE]):
            values = outcomes(own)[name]
            cells.append(rate(sum(values), len(values)))
            if arm != REFERENCE:
                cells.append(against(values, outcomes(found[REFERENCE])[name]))
            else:
                cells.append("-")
        rows.append([named(arm), *cells, f"{fmean(own['sums']['length']):.0f}"])
    columns = [column for name in outcomes(found[REFERENCE]) for column in (f"{name}, %", "against DAPO")]
    caption = "95 % intervals: Wilson, and for differences in points the paired bootstrap over prompts."
    return Table("After training", ["arm", *columns, "tokens of an answer"], rows, caption)


def copies_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Teacher-forced probability per token of a further copy, and what clean text has become."""
    rows: list[list[Any]] = []
    for arm, own in found.items():
        cells: list[Any] = []
        for kind, copies in PROBED:
            values, others = (probability(of["copies"][kind], copies) for of in (own, found[REFERENCE]))
            cells += [f"{100 * fmean(values):.1f}", "-" if arm == REFERENCE else against(values, others)]
        kl, loss = fmean(own["clean"]["kl"]), own["clean"]["loss"]
        change = "-" if arm == START else against(loss, found[START]["clean"]["loss"], 1.0, "+.4f")
        rows.append([named(arm), *cells, f"{kl:.4f}", change])
    columns = [column for kind, copies in PROBED for column in (f"{kind}, after {copies}, %", "against DAPO")]
    caption = (
        "Geometric mean over the tokens of a copy, mean over places; differences in points with a paired bootstrap "
        "over places. KL from the start model and loss, nats per token, on held-out documentation."
    )
    return Table("Probability of a further copy", ["arm", *columns, "KL", "loss against the start"], rows, caption)


def pairs_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Kinds of negatives against each other, over the same prompts and places."""
    rows: list[list[Any]] = []
    for one, two in (pair for pair in PAIRS if set(pair) <= set(found)):
        cells = [against(values, outcomes(found[two])[name]) for name, values in list(outcomes(found[one]).items())[:3]]
        for copies in (1, 2, 4):
            first, second = (probability(found[arm]["copies"]["open text"], copies) for arm in (one, two))
            cells.append(against(first, second))
        rows.append([f"{named(one)} against {named(two)}", *cells])
    columns = ["arms", *list(outcomes(found[REFERENCE]))[:3], *(f"open text, after {copies}" for copies in (1, 2, 4))]
    return Table("Negatives against each other", columns, rows, "Points, with paired bootstrap intervals over prompts.")


def outcomes(own: Mapping[str, Any]) -> dict[str, list[bool]]:
    """What happened at each prompt, by the name of a column."""
    return {
        "right": own["sums"]["right"],
        "greedy loops": own["greedy"]["endless"],
        **{f"seeded, {name}": values for name, values in own["endless"].items()},
    }


def probability(copies: Sequence[Sequence[float]], given: int) -> list[float]:
    """Per place: the probability per token of the next copy when `given` copies stand there."""
    return [math.exp(place[given - 1]) for place in copies]


def against(values: Sequence[float], others: Sequence[float], unit: float = 100.0, form: str = "+.1f") -> str:
    """The mean difference with its interval, over the same prompts."""
    one, two = ([[unit * float(value)] for value in given] for given in (values, others))
    return shown(bootstrap_difference(one, two), form)


def rate(count: int, of: int) -> str:
    """A share in per cent with its Wilson interval."""
    return shown(wilson(count, of), ".0f", 100)


def named(arm: str) -> str:
    """The name of an arm in tables."""
    return "before training" if arm == START else ARMS[arm][0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Some parts alone, which `make real` then finds done: `python -m benchmarks.real.studies.negatives start dapo ..`.
    With --output the numbers of all parts that are done so far, as `make real` writes them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{START}, features, {', '.join(ARMS)}, in this order")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--saes", type=Path, required=True, help="folder of its SAEs")
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="layers that have an SAE")
    parser.add_argument("--work", type=Path, required=True, help="folder of the study")
    parser.add_argument("--quick", action="store_true", help="as of `make real`")
    parser.add_argument("--output", type=Path, help="JSON file of the numbers")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.parts) - {START, "features", *ARMS}):
        parser.error(f"no part {unknown[0]}")
    run_steps(options, options.parts)
    if options.output is not None:
        done = [arm for arm in (START, *ARMS) if (options.work / f"{arm}.json").is_file()]
        steps = list(steps_of(options.work).values())
        known = {key: steps[-1][key] for key in ("commit", "machine", "versions")}
        known |= {key: sum(step[key] for step in steps) for key in ("seconds", "processor_seconds")}
        known["peak_mib"] = max(step["peak_mib"] for step in steps)
        result = to_json({**known, **collect(options.work, done)})
        write_text(options.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
