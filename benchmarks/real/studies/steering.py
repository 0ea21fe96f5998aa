"""Study 4: the report's two case studies of steering. A language is suppressed in Gemma, a style is caused in SmolLM2.

Features are found by `qscope features contrast` on texts of their own. A teacher-forced probe then compares layers,
strengths and controls of equal length: how much likelier a text of the target has become after real beginnings, beside
a text that has nothing to do with it. `qscope steer --curve` samples at the layer that the probe chose, from other
beginnings.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real.steering_probe import Item, best_layer, equal_cost_table, probe_all, probe_table
from benchmarks.real.steps import ROOT, run_step
from benchmarks.real.texts import identified, lines, paragraphs
from benchmarks.real.texts import items as benchmark
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.report.summary import write_rows, write_text
from qscope_posttrain.report.tables import Table
from qscope_posttrain.text.scripts import language_scripts, script_counts

SUPPRESSING, CAUSING = (0.025, 0.05, 0.1, 0.2, 0.4), (0.05, 0.1, 0.2, 0.4)
"""Strengths of the probe"""
PROBED = 24
"""Beginnings that the probe reads"""
TAIL = 60
SHOWN = 2
"""Prompts whose responses are kept"""
MARKER_WORDS, MARKER_RATE = 40, 0.0005


@dataclass(frozen=True)
class Case:
    """One target of one model."""

    label: str
    model: str
    positive: Sequence[str]
    negative: Sequence[str]
    items: Sequence[Item]
    """Of the probe"""
    prompts: Sequence[str]
    """Of the dose curve"""
    other_texts: Sequence[str]
    sign: int
    """-1 to suppress the target, 1 to cause it"""
    strengths: Sequence[float]
    """In median residual norms"""
    recipe: str | None
    pattern: str | None = None


def run(options: argparse.Namespace) -> dict[str, Any]:
    layers = options.layers[1:2] if options.quick else options.layers
    found: list[dict[str, Any]] = []
    for case in cases(options.model.name, 8 if options.quick else 40):
        found.append(study(case, options, layers))
        layers = [found[0]["layer"]]  # a second language is probed where the first one is best
    tables = {f"{result['label']}_{name}": table for result in found for name, table in result.pop("tables").items()}
    return {"tables": tables, "cases": found}


def cases(model: str, count: int) -> list[Case]:
    """The cases of a model."""
    return [register(count)] if model == "smollm2" else [language("zh", count), language("fr", count)]


def language(label: str, count: int) -> Case:
    """English documentation that slips into another language for a few words."""
    english, other = ([text for text in paragraphs(name, held_out=True) if len(text) > least]
                      for name, least in (("en", 150), (label, 40 if label == "zh" else 100)))  # fmt: skip
    items = []
    for text, foreign in zip(english[::2], other[::2], strict=False):
        words, slipped = text.split(" "), cut(foreign, label)
        context = " ".join([*words[:12], slipped])
        rest = " " + " ".join(words[12:])
        items.append(Item(context, foreign[len(slipped) :], rest, (" ".join(words[:12]), rest)))
    learned = [paragraphs(name, held_out=False)[:: 1 if count < 40 else 8] for name in (label, "en")]
    probe, prompts = items[:PROBED], [item.context for item in items[-count:]]
    recipe = "steer_language.yaml" if label == "zh" else None
    return Case(
        label,
        "gemma3",
        *(texts[: 8 * count] for texts in learned),
        probe,
        prompts,
        english[1::2],
        -1,
        SUPPRESSING,
        recipe,
    )


def cut(text: str, label: str) -> str:
    """The slip: the first eight characters, or three words."""
    return text[:8] if label == "zh" else " ".join(text.split(" ")[:3])


def register(count: int) -> Case:
    """Everyday sentences against the prose of software documentation; a chat model is asked for stories."""
    sentences = lines("tatoeba/en.txt")
    everyday, tested = (
        [text for text in part if len(text.split()) >= 10] for part in (sentences[::2], sentences[1::2])
    )
    documentation = [text for text in paragraphs("en", held_out=True) if len(text) > 60]
    learned = paragraphs("en", held_out=False)[::8]
    problems = [problem["question"].split(" ") for problem in benchmark("gsm8k_test")[1::2]]
    items = [
        Item(first, f" {text}", f" {second}", (" ".join(words[:12]), " " + " ".join(words[12:])))
        for first, text, second, words in zip(tested[:PROBED], documentation, tested[PROBED:], problems, strict=False)
    ]
    prompts = [f"Write a short story that begins with: {text}" for text in tested[2 * PROBED : 2 * PROBED + count]]
    rest = tested[2 * PROBED + count :]
    pattern = marker_pattern(markers(learned, sentences[::2]))
    learned, everyday = learned[: 8 * count], everyday[: 8 * count]
    return Case("documentation", "smollm2", learned, everyday, items, prompts, rest, 1, CAUSING, "steer_register.yaml",
                pattern)  # fmt: skip


def markers(positive: Sequence[str], negative: Sequence[str]) -> list[str]:
    """Words whose share of the positive texts exceeds that of the negative ones most, and that these hardly hold."""
    counts = [Counter(word for text in texts for word in set(re.findall(r"[a-z]{3,}", text.lower())))
              for texts in (positive, negative)]  # fmt: skip
    rare = [word for word in counts[0] if counts[1][word] <= MARKER_RATE * len(negative)]
    return sorted(rare, key=lambda word: (-counts[0][word], word))[:MARKER_WORDS]


def marker_pattern(words: Sequence[str]) -> str:
    """One of the words, in a regular expression."""
    return rf"(?i)\b({'|'.join(words)})\b"


def study(case: Case, options: argparse.Namespace, layers: Sequence[int]) -> dict[str, Any]:
    """Find the features, probe all layers, and sample at the best one."""
    work = options.work / case.label
    work.mkdir(parents=True, exist_ok=True)
    given = {"positive": case.positive, "negative": case.negative, "other": case.other_texts}
    files = {name: work / f"{name}.txt" for name in given}
    for name, texts in given.items():
        write_text(files[name], "\n".join(text.replace("\n", " ") for text in texts) + "\n")
    found = work / "features"
    command = ["qscope_posttrain", "features", "contrast", "--model", options.model, "--sae", options.saes, "--layers",
               *options.layers, "--positive", files["positive"], "--negative", files["negative"], "--names",
               case.label, "other", "--max-length", 128, "--output", found]  # fmt: skip
    reads = [options.model, options.saes]
    run_step("contrast", list(map(str, command)), [*reads, files["positive"], files["negative"]], work)
    features = FeatureSet.load(found)
    strengths = case.strengths[1:2] if options.quick else case.strengths
    rows = probe_all(case.label, case.sign, case.items, options, layers, strengths, features, work / "probe.json")
    layer = best_layer(rows, case.sign)
    result: dict[str, Any] = {"label": case.label, "layer": layer, "probe": rows, "prompts": len(case.prompts)}
    result["features"] = {str(number): own.feature_ids.tolist() for number, own in features.layers.items()}
    result["tables"] = {
        "probe": probe_table(case.label, case.sign, rows).to_dict(),
        "equal_cost": equal_cost_table(case.label, case.sign, rows).to_dict(),
    }
    if case.recipe is not None:
        curve, seconds = sample_curve(case, options, layer, found, work)
        result["tables"]["curve"] = curve["table"]
        responses = [json.loads(line) for line in (work / "curve" / "responses.jsonl").read_text("utf-8").splitlines()]
        result["responses"] = [row for row in responses if row["prompt"] < SHOWN]
        if case.model == "gemma3":
            result["tables"]["endings"] = endings_table(case, responses).to_dict()
        result |= {"best": curve["best"], "verdict": curve["verdict"], "curve_seconds": seconds}
    if case.pattern is not None:
        texts = {"documentation": paragraphs("en", held_out=True), "everyday": list(case.other_texts)}
        result["pattern"] = case.pattern
        result["pattern_on_real_text"] = {name: rate(case.pattern, texts[name]) for name in texts}
    return result


def rate(pattern: str, texts: Sequence[str], length: int = 160) -> float:
    """Share of texts, cut to the length of a response, in which the pattern is found."""
    return sum(bool(re.search(pattern, text[:length])) for text in texts) / len(texts)


def sample_curve(case: Case, options: argparse.Namespace, layer: int, features: Path, work: Path) -> tuple[Any, int]:
    """What `qscope steer --curve` writes, and its processor seconds."""
    prompts, output = work / "prompts.jsonl", work / "curve"
    write_rows(prompts, ({"prompt": text} for text in case.prompts))
    recipe = ROOT / "recipes" / "real" / str(case.recipe)
    command = ["qscope_posttrain", "steer", "--config", recipe, "--model", options.model, "--sae", options.saes,
               "--features", features, "--layer", layer, "--prompts", prompts, "--other-texts", work / "other.txt",
               "--output", output]  # fmt: skip
    if case.pattern is not None:
        command += ["--effect-pattern", case.pattern]
    if options.quick:
        command += ["--curve", case.sign * case.strengths[1], "--max-new-tokens", 16]
    reads = [options.model, options.saes, recipe, prompts, features, work / "other.txt"]
    ran = run_step("curve", list(map(str, command)), reads, work)
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))["results"], ran["processor_seconds"]


def endings_table(case: Case, responses: Sequence[Mapping[str, Any]]) -> Table:
    """What the responses of each point end in."""
    groups: dict[tuple[str, float], list[str]] = {}
    for row in responses:
        groups.setdefault((row["kind"], row["strength"]), []).append(ending(row["response"], case.label))
    rows = [[*key, *(f"{100 * found.count(kind) / len(found):.0f}" for kind in (case.label, "en", "other"))]
            for key, found in groups.items()]  # fmt: skip
    columns = ["steered along", "strength", f"{case.label}, %", "en, %", "other, %"]
    caption = f"Language of the last {TAIL} characters of a response: by script, or as fastText identifies it."
    return Table(f"What responses to a slip into {case.label} end in", columns, rows, caption)


def ending(response: str, label: str) -> str:
    """Language of the end of a response: `label`, en or other."""
    counts = script_counts(response[-TAIL:])
    script = max(counts, key=lambda name: counts[name], default="")
    if script != "Latin":
        return label if script in language_scripts(label) else "other"
    found, _ = identified(response[-TAIL:])
    return found if found in (label, "en") else "other"
