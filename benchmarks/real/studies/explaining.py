"""Study 7: explanations of features and data for them by a real chat model, SmolLM2-135M-Instruct.

The same features are explained and judged in several ways: by the command as it comes; with templates for a small
model; with the first characters of each answer given, so that it begins in the form asked for; and without a chat
model, by a list of the tokens that fire. Data are then written for features of word problems.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real.stand_ins import Begun, Tokens
from benchmarks.real.steps import ROOT, run_step
from benchmarks.real.texts import items, lines, paragraphs
from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatModel
from qscope_posttrain.endpoint.models import LocalChatModel
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.ask import ExplainSettings, explain_features, explain_templates
from qscope_posttrain.features.explain.contexts import ContextSettings
from qscope_posttrain.features.explain.explanation import Explained, Explanation, FeatureId
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import to_json, write_text
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.synthesis import coverage, report
from qscope_posttrain.synthesis.pipeline import Synthesis, SynthesisSettings, synthesis_templates

TEMPLATES = ROOT / "recipes" / "real" / "small_chat_model"
TOPIC = "a word problem in arithmetic"
AS_A_USER = 4
"""Features that are explained by the command"""
FIRING_TEXTS = 20
"""Texts on which a feature fires at least, to be explained"""


@dataclass(frozen=True)
class Study:
    """Model, SAE and files of the study, each loaded when it is first used."""

    options: argparse.Namespace
    layer: int

    @property
    def work(self) -> Path:
        return Path(self.options.work)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return load_model(str(self.options.model), dtype="float32", device="cpu")

    @cached_property
    def texts(self) -> list[str]:
        found = paragraphs("en", held_out=True)[:160] + lines("tatoeba/en.txt")[::30]
        found += [item["question"] for name in ("gsm8k_test", "mawps") for item in items(name)[1:160:2]]
        random.Random(0).shuffle(found)
        return [text.replace("\n", " ") for text in (found[:120] if self.options.quick else found)]

    def reader(self, *layers: int) -> coverage.FeatureReader:
        saes = {layer: SparseAutoencoder.load(self.options.saes, layer=layer) for layer in layers}
        return coverage.FeatureReader(*self.loaded, saes, max_length=128)

    def chat(self, begun: bool) -> ChatModel:
        return (Begun if begun else LocalChatModel)(*self.loaded, name=f"smollm2{' begun' if begun else ''}")

    def part(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of one part, unless it is there already."""
        path = self.work / "parts" / f"{name}.json"
        if not path.is_file():
            status(f"explaining: {name}")
            found = json.dumps(to_json(compute()), ensure_ascii=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, found)
        return json.loads(path.read_text(encoding="utf-8"))


def run(options: argparse.Namespace) -> dict[str, Any]:
    study = Study(options, options.layers[len(options.layers) // 2])
    count, targets = (3, 8) if options.quick else (8, 40)
    chosen = study.part("features", lambda: choose(study, count, targets))
    asked = chosen["random"][: 1 if options.quick else AS_A_USER]
    commands = {
        name: study.part(name.replace(" ", "_"), lambda name=name: as_a_user(study, asked, name))
        for name in ("as it comes", "small templates")
    }
    explained = {
        "begun answers": lambda: explained_by(study, chosen["random"], study.chat(True), study.chat(True)),
        "tokens, judged by the model": lambda: explained_by(study, chosen["random"], Tokens(), study.chat(True)),
        "tokens, counted": lambda: explained_by(study, chosen["random"], Tokens(), Tokens()),
        "tokens, counted, topic": lambda: explained_by(study, chosen["topic"][:12], Tokens(), Tokens()),
    }
    scores = {name: study.part(name.replace(" ", "_"), compute) for name, compute in explained.items()}
    relevance = study.part("relevance", lambda: relevance_ratings(study, chosen))
    written = study.part("synthesis", lambda: synthesize(study, chosen["topic"]))
    tables = {"explanations": score_table({**commands, **scores})}
    if written["coverage"] is not None:
        tables["synthesis"] = Table(**written["coverage"])
    return {
        "tables": {name: table.to_dict() for name, table in tables.items()},
        "commands": commands, "explained": scores, "relevance": relevance, "synthesis": written, "chosen": chosen,
    }  # fmt: skip


def choose(study: Study, count: int, targets: int) -> dict[str, list[int]]:
    """`count` random features of those that fire on enough texts, and `targets` that are commonest in word problems
    against other text, both as ids."""
    matrix = study.reader(study.layer).features(study.texts)[study.layer].matrix > 0
    texts = np.asarray(matrix.sum(axis=0)).ravel()
    enough = np.flatnonzero(texts >= min(FIRING_TEXTS, len(study.texts) // 8))
    known = problems()
    problem = np.array([text in known for text in study.texts])
    more = np.asarray(matrix[problem].mean(axis=0) - matrix[~problem].mean(axis=0)).ravel()
    order = np.argsort(-more, kind="stable")
    drawn = random.Random(0).sample(sorted(set(enough.tolist()) - set(order[:targets].tolist())), count)
    return {"random": drawn, "topic": order[:targets].tolist(), "firing_texts": texts[drawn].tolist()}


def problems() -> frozenset[str]:
    """All word problems that a study may read."""
    return frozenset(
        item["question"].replace("\n", " ") for name in ("gsm8k_test", "mawps") for item in items(name)[1::2]
    )


def as_a_user(study: Study, ids: Sequence[int], name: str) -> dict[str, Any]:
    """Run `qscope features explain` with the chat model, with the package's templates or those for a small model: its
    tables, or its last message, and the share of readable first answers."""
    options, step = study.options, name.replace(" ", "_")
    texts, output = study.work / "texts.txt", study.work / step
    write_text(texts, "\n".join(study.texts) + "\n")
    command = ["qscope_posttrain", "features", "explain", "--model", options.model, "--sae", options.saes, "--layers",
               study.layer, "--feature-ids", *ids, "--texts", texts, "--max-length", 128, "--tests", 10, "--local",
               "--chat-model", options.model, "--output", output]  # fmt: skip
    if name != "as it comes":
        command += ["--templates", TEMPLATES, "--methods", "none"]
    found: dict[str, Any] = {"said": ""}
    reads = [options.model, options.saes, texts, *([TEMPLATES] if name != "as it comes" else [])]
    try:
        ran = run_step(step, list(map(str, command)), reads, study.work)
        results = json.loads((output / "summary.json").read_text(encoding="utf-8"))["results"]
        found |= {"table": results["table"], "tested": results["tested"], "skipped": results["skipped"],
                  "processor_seconds": ran["processor_seconds"]}  # fmt: skip
    except UserValueError as error:  # no explanation could be read: what the user is told
        found["said"] = str(error).splitlines()[-1]
        if "readably" not in found["said"]:
            raise
    return {**found, **answers(output / "answers.jsonl", len(ids))}


def answers(path: Path, features: int) -> dict[str, Any]:
    """Of a cache of answers: how many explanations could be read, of how many asked for, and examples of answers."""
    read, examples = 0, []
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    explain = [row for row in kept if '"explanation"' in row["request"]["messages"][-1]["content"]]
    for row in explain:
        text = row["completion"]["text"]
        read += bool(re.search(r'\{\s*"explanation":\s*"[^"]+"\s*\}', text))
        examples.append(text[:200])
    return {"asked": len(explain), "readable": read, "features": features, "examples": examples[:5]}


def explained_by(study: Study, ids: Sequence[int], explainer: ChatModel, judge: ChatModel) -> dict[str, Any]:
    """Explanations of features by one model and their scores by another, as of `features explain`."""
    name = f"{explainer.identity['name']} {judge.identity['name']}".replace(" ", "_")
    saes = {study.layer: SparseAutoencoder.load(study.options.saes, layer=study.layer)}
    # Lists of tokens read the package's templates, and a model those for a small one.
    templates = explain_templates(None if isinstance(judge, Tokens) else TEMPLATES)
    settings = ExplainSettings(contexts=ContextSettings(absent=20), tests=10)
    with CompletionCache(study.work / f"{name}.jsonl") as cache:
        session = ChatSession(explainer, cache)
        try:
            found = explain_features(*study.loaded, study.texts, saes, {study.layer: ids}, session, settings,
                                     judge=session.beside(judge), templates=templates, max_length=128)  # fmt: skip
        except UserValueError as error:  # not one explanation could be read
            return {"said": str(error), "features": len(ids)}
    skipped = {str(feature): why for feature, why in found.skipped.items()}
    return {"table": found.to_table().to_dict(), "tested": found.summary_table().to_dict(), "skipped": skipped,
            **decided(found)}  # fmt: skip


def decided(found: Explained) -> dict[str, int]:
    """Of the decisions by a feature's own words in detection: how many said yes, of all."""
    counts = [entry.detection for entry in found.explanations if entry.detection is not None]
    yes = sum(count.hits + count.negatives - count.rejections for count in counts)
    return {"yes": yes, "decisions": sum(count.positives + count.negatives for count in counts)}


def score_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line per way and test."""
    rows: list[list[Cell]] = []
    for name, found in runs.items():
        if "table" not in found:
            rows.append([name, f"0 of {found['features']}", *[None] * 5])
            continue
        explained = len(found["table"]["rows"])
        if not found["tested"]["rows"]:
            rows.append([name, f"{explained} of {explained + len(found['skipped'])}", *[None] * 5])
        rows += [
            [name, f"{explained} of {explained + len(found['skipped'])}", *row[:1], *row[2:]]
            for row in found["tested"]["rows"]
        ]
    columns = ["explained and judged by", "explained", "test", "balanced accuracy", "another feature's words",
               "difference", "unreadable answers of the judge"]  # fmt: skip
    caption = (
        "Random features of layer 15 that fire on 20 texts or more; topic: the twelve that are commonest in word "
        "problems against other text. Ten held-out contexts of each kind for every feature. Means over features, 95 % "
        "bootstrap intervals over features. Chance is 0.5."
    )
    return Table("Explanations by a chat model of 135 million parameters", columns, rows, caption)


def token_explanations(study: Study, ids: Sequence[int]) -> dict[FeatureId, Explanation]:
    """Lists of tokens for features, without tests."""
    saes = {study.layer: SparseAutoencoder.load(study.options.saes, layer=study.layer)}
    with CompletionCache(study.work / "topic_tokens.jsonl") as cache:
        found = explain_features(*study.loaded, study.texts, saes, {study.layer: ids}, ChatSession(Tokens(), cache),
                                 ExplainSettings(methods=(), min_texts=2), max_length=128)  # fmt: skip
    return {entry.feature: entry for entry in found.explanations}


def relevance_ratings(study: Study, chosen: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Let the model rate topic features and random ones, as step 1 of `qscope synthesize` does."""
    explained = token_explanations(study, [*chosen["topic"][:12], *chosen["random"]])
    topic = set(chosen["topic"])
    found: dict[str, Any] = {}
    for begun, templates in ((False, None), (True, TEMPLATES)):
        with CompletionCache(study.work / f"relevance_{begun}.jsonl") as cache:
            session = ChatSession(study.chat(begun), cache)
            name = "begun answers" if begun else "as it comes"
            try:
                made = synthesis_templates(templates)
                rated, unreadable = coverage.judge_relevance(session, made, list(explained.values()), TOPIC)
            except UserValueError as error:
                found[name] = {"said": str(error)}
                continue
        truth = np.array([feature.feature_id in topic for feature in rated])
        values = np.array(list(rated.values()))
        area = above(values[truth], values[~truth]) if 0 < truth.sum() < len(truth) else None
        found[name] = {"rated": len(rated), "unreadable": len(unreadable), "distinct": sorted(set(values.tolist())),
                       "at_least_half": int((values >= 0.5).sum()), "auroc": area}  # fmt: skip
    return found


def above(ones: NDArray[Any], others: NDArray[Any]) -> float:
    """Share of pairs in which the first is higher, ties half: the area under the ROC curve."""
    difference = ones[:, None] - others[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def synthesize(study: Study, targets: Sequence[int]) -> dict[str, Any]:
    """Steps 3 and 4 of `qscope synthesize` for features of word problems: prompts for half of the targets, as many for
    the topic alone, and coverage of the other half and of another layer."""
    explained = token_explanations(study, targets)
    known = sorted(explained)
    made_for, held_out = coverage.split_targets(known, 0.5, 0)
    natural = sorted(problems())
    random.Random(0).shuffle(natural)
    natural = natural[: 60 if study.options.quick else 300]
    below = study.options.layers[0]
    reader = study.reader(below, study.layer)
    settings = SynthesisSettings(topic=TOPIC, kinds=("benign",), styles=(), rounds=3, confirm_kind=False,
                                 max_tokens=24 if study.options.quick else 160)  # fmt: skip
    with CompletionCache(study.work / "synthesis.jsonl") as cache:
        session = ChatSession(study.chat(True), cache)
        synthesis = Synthesis(session, synthesis_templates(TEMPLATES), settings)
        made = synthesis.run(made_for, explained, reader.verify)
        control = Synthesis(session, synthesis_templates(TEMPLATES), settings)
        drafts = control.random(made.vanilla_drawn, 0)
    with CompletionCache(study.work / "synthesis_as_it_comes.jsonl") as cache:
        plain = Synthesis(ChatSession(study.chat(False), cache), synthesis_templates(), settings)
        as_it_comes = plain.random(8, 0)
    tables, _ = report.measure(made, made_for, held_out, reader, random_drafts=drafts, random_requests=made.drawn,
                               natural=natural, other_layers=[below])  # fmt: skip
    return {
        "targets": len(known), "made_for": len(made_for), "held_out": len(held_out), "drawn": made.drawn,
        "written": len(made.drafts), "verified": len(made.drafts) and len(made_for) - len(made.without),
        "kept": len(made.examples), "rejected": dict(made.rejected), "control_written": len(drafts),
        "as_it_comes": {"asked": 8, "readable": len(as_it_comes)}, "coverage": tables[0].to_dict() if tables else None,
        "prompts": [draft.text for draft in made.drafts[:6]], "control_prompts": [draft.text for draft in drafts[:6]],
    }  # fmt: skip
