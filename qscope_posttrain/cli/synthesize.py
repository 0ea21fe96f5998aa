"""`qscope synthesize`: training data for the features of a topic that the data at hand does not reach."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.endpoint_options import add_endpoint_options, check_endpoint_options, open_session
from qscope_posttrain.cli.inputs import load_model, parse_layers, read_text_list
from qscope_posttrain.cli.options import OptionParser, add_model_options
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary, write_text

if TYPE_CHECKING:
    from qscope_posttrain.endpoint.session import ChatSession
    from qscope_posttrain.endpoint.templates import PromptTemplates
    from qscope_posttrain.features.explain.explanation import Explanation, FeatureId
    from qscope_posttrain.report.tables import Table
    from qscope_posttrain.synthesis.pipeline import SynthesisRun
    from qscope_posttrain.synthesis.prompts import Draft

DATA = "data"
PROMPTS = "prompts.jsonl"
RELEVANCE = "relevance.csv"
PAGE = "report.html"


def run(arguments: Sequence[str]) -> int:
    """Choose targets, write prompts and responses, measure coverage; leave data, prompts, a page and a summary."""
    from qscope_posttrain.features.explain.explanation_file import read_explanations
    from qscope_posttrain.features.find.language import load_sae
    from qscope_posttrain.models.layers import decoder_layers
    from qscope_posttrain.synthesis import coverage, dataset, pipeline, report
    from qscope_posttrain.synthesis.prompts import synthesis_templates
    from qscope_posttrain.synthesis.reading import FeatureReader
    from qscope_posttrain.synthesis.relevance import write_relevance

    options = _parser().parse(arguments)
    require_extra("analysis", "report")
    check_endpoint_options(options)
    settings = _settings(options)
    output = writable_folder(options.output)
    templates = synthesis_templates(options.templates)
    explanations = {entry.feature: entry for entry in read_explanations(options.explanations)}
    seed_texts = read_text_list(options.seed_data, options.max_texts)
    natural = [] if options.natural is None else read_text_list(options.natural, options.max_texts)
    random.Random(options.seed).shuffle(natural)
    if options.measure_layers and len(natural) < 2:
        raise UserValueError(
            "--measure-layers counts the features that natural text fires there; give some with --natural."
        )
    model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
    others = parse_layers(options.measure_layers, len(decoder_layers(model))) if options.measure_layers else ()
    with open_session(options, output) as (session, judge):
        relevance, unreadable = _relevance(options, explanations, judge, templates)
        targets = coverage.target_features(relevance, options.tau)
        write_relevance(output / RELEVANCE, relevance)
        made_for, held_out = coverage.split_targets(targets, options.held_out, options.seed)
        _check_explained(made_for, explanations)
        source_layers = {target.layer for target in targets}
        if source_layers & set(others):
            raise UserValueError(
                f"prompts are verified on layers {sorted(source_layers)}; --measure-layers must be others."
            )
        saes = {layer: load_sae(options.sae, layer, options.k, model) for layer in sorted(source_layers | set(others))}
        reader = FeatureReader(model, tokenizer, saes, options.max_length)
        seed_hits = coverage.firing(reader.read(seed_texts, sorted(source_layers)), targets)
        counts = dict(zip(targets, seed_hits.sum(axis=0).tolist(), strict=True))
        wanted = coverage.missing_first(made_for, [counts[target] for target in made_for], settings.enough)
        missing = sum(counts[target] == 0 for target in wanted)
        status(
            f"{len(targets)} targets, {len(held_out)} of them held out; of the others the seed data misses "
            f"{missing} and reaches {len(wanted) - missing} fewer than {settings.enough} times"
        )
        if not wanted:
            raise UserValueError(
                f"the seed data fires every target {settings.enough} times; raise --enough or lower --tau."
            )
        made = pipeline.synthesize(wanted, explanations, session, templates, settings, reader.verify, judge=judge)
        spent = session.usage.to_dict()
        drafts, asked = _random_control(options, made, session, templates, settings)
        usage = session.usage.to_dict()
    rows: Sequence[Mapping[str, Any]] = [dataset.example_row(example, relevance) for example in made.examples]
    rows = dataset.balanced(rows, options.seed) if options.balance else rows
    _write_prompts(output / PROMPTS, made, drafts or [])
    if not rows:
        reason = made.stopped or f"{output / PROMPTS} holds what was written."
        raise UserValueError(f"no prompt fired its feature and was answered; {reason}")
    dataset.save_rows(rows, output / DATA)
    measured = report.measure(
        made,
        wanted,
        held_out,
        reader,
        random_drafts=drafts,
        random_requests=asked,
        natural=natural,
        other_layers=others,
        seed=options.seed,
    )
    new_hits = coverage.firing(
        reader.read([row["prompt"][0]["content"] for row in rows], sorted(source_layers)), targets
    )
    tables = [_rows_table(rows, made), report.target_table(targets, seed_hits, new_hits), *measured.tables]
    for table in tables:
        table.print()
    _write_page(output / PAGE, tables, measured.figure)
    results = {
        "data": output / DATA,
        "tables": tables,
        "targets": len(targets),
        "worked on": len(wanted),
        "relevance unreadable": [str(feature) for feature in unreadable],
        "rejected for their response": dict(made.rejected),
        "unfinished": [str(feature) for feature in made.unfinished],
        "no prompt fired": [str(feature) for feature in made.without],
        "usage of the data": spent,
        "usage with the control": usage,
    }
    write_summary(output, "synthesize", vars(options), results)
    if made.unfinished:
        status(f"the budget left {len(made.unfinished)} targets undone; raise it and run the same command to go on")
    status(f"{len(rows)} examples written to {output / DATA}")
    return 0


def _settings(options: argparse.Namespace) -> Any:
    from qscope_posttrain.synthesis.settings import STYLES, SynthesisSettings

    return SynthesisSettings(
        topic=options.topic,
        kinds=tuple(options.kinds),
        styles=STYLES if options.styles is None else tuple(options.styles),
        prompts_per_kind=options.prompts_per_kind,
        rounds=options.rounds,
        enough=options.enough,
        features_at_once=options.features_at_once,
        temperature=options.temperature,
        max_tokens=options.max_new_tokens,
        confirm_kind=options.confirm_kind,
    )


def _relevance(
    options: argparse.Namespace,
    explanations: Mapping[FeatureId, Explanation],
    judge: ChatSession,
    templates: PromptTemplates,
) -> tuple[Mapping[FeatureId, float], Sequence[FeatureId]]:
    """(relevance, features that the judge did not rate readably)."""
    from qscope_posttrain.synthesis.relevance import judge_relevance, read_relevance

    if options.relevance is not None:
        return read_relevance(options.relevance), ()
    found = judge_relevance(judge, templates, list(explanations.values()), options.topic)
    if found.unreadable:
        status(
            f"{len(found.unreadable)} of {len(explanations)} features have no readable relevance and are left out: "
            f"{', '.join(map(str, found.unreadable[:5]))}"
        )
    return found.relevance, found.unreadable


def _check_explained(targets: Sequence[FeatureId], explanations: Mapping[FeatureId, Explanation]) -> None:
    missing = [str(target) for target in targets if target not in explanations]
    if missing:
        raise UserValueError(
            f"{len(missing)} targets of the table have no explanation to write prompts from: {', '.join(missing[:5])}."
        )


def _random_control(
    options: argparse.Namespace, made: SynthesisRun, session: ChatSession, templates: PromptTemplates, settings: Any
) -> tuple[list[Draft] | None, int]:
    """(drafts, prompts asked for); nothing where it is switched off, or the budget does not reach."""
    from qscope_posttrain.endpoint.failures import BudgetSpent
    from qscope_posttrain.synthesis.pipeline import random_synthesis

    if not options.random_control:
        return None, 0
    rewrites = made.drawn - made.vanilla_drawn
    try:
        return random_synthesis(made.vanilla_drawn, rewrites, session, templates, settings), made.drawn
    except BudgetSpent as error:
        status(f"no random control: {error}")
        return None, 0


def _write_prompts(path: Path, made: SynthesisRun, control: Sequence[Draft]) -> None:
    """Every prompt that was written, what it was for, and whether it was kept."""
    activation = {id(example.draft): example.activation for example in made.examples}
    lines = []
    for strategy, drafts in (("feature-driven", made.drafts), ("random", control)):
        for draft in drafts:
            entry = {
                "strategy": strategy,
                "prompt": draft.text,
                "layer": draft.feature.layer if draft.feature else None,
                "feature": draft.feature.feature_id if draft.feature else None,
                "kind": draft.kind,
                "prompt_type": draft.prompt_type,
                "style": draft.style,
                "request": draft.request_id,
                "kept": id(draft) in activation,
                "activation": activation.get(id(draft)),
            }
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def _rows_table(rows: Sequence[Mapping[str, Any]], made: SynthesisRun) -> Table:
    from qscope_posttrain.report.tables import Cell, Table
    from qscope_posttrain.synthesis.dataset import type_counts

    cells: list[list[Cell]] = [[name, count] for name, count in type_counts(rows).items()]
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(made.rejected.items()))
    features = len({(row["layer"], row["feature"]) for row in rows})
    caption = (
        f"{len(rows)} examples for {features} features, from {made.drawn} prompts asked for; {len(made.without)} "
        f"features that no prompt fired; {made.undecided} verified prompts without a kind or a whole response"
        f"{f' ({reasons})' if reasons else ''}."
    )
    return Table("Examples", ["type", "examples"], cells, caption)


def _write_page(path: Path, tables: Sequence[Table], figure: str) -> None:
    from qscope_posttrain.report.html import Figure, Section, write_html

    section = Section("Coverage", tables=tables, figures=[Figure(figure, "Prompts of each strategy in random order.")])
    write_html(path, "Feature-driven synthesis", [section])


def _parser() -> OptionParser:
    parser = OptionParser(prog="qscope synthesize")
    add_model_options(parser)
    parser.add_argument("--sae", required=True, help="folder of layer files, file of one layer, or hub id of a release")
    parser.add_argument("--explanations", required=True, help="explanations.jsonl, or a FeatureSet that holds some")
    parser.add_argument("--topic", required=True, help="what the data is about, in a few words")
    parser.add_argument(
        "--seed-data", required=True, help="data at hand: a file with one text a line, or JSONL with text"
    )
    parser.add_argument(
        "--output", required=True, help="folder for the data, every prompt, answers, page and summary.json"
    )
    parser.add_argument("--relevance", help="CSV of layer, feature, relevance; by default the judge rates explanations")
    parser.add_argument("--tau", type=float, default=0.5, help="relevance that makes a feature a target")
    parser.add_argument(
        "--held-out", type=float, default=0.5, help="share of targets kept apart, to measure coverage on"
    )
    parser.add_argument("--measure-layers", nargs="+", help="further layers to measure coverage on; needs --natural")
    parser.add_argument("--natural", help="texts of people on the topic: the control of natural sampling")
    parser.add_argument(
        "--random-control", action=argparse.BooleanOptionalAction, default=True, help="as many prompts without features"
    )
    parser.add_argument("--kinds", nargs="+", default=["harmful", "benign"], help="kinds of prompts asked for")
    parser.add_argument("--styles", nargs="*", help="styles of adversarial rewrites, each one argument; none for none")
    parser.add_argument("--prompts-per-kind", type=int, default=1, help="vanilla prompts for each feature and kind")
    parser.add_argument(
        "--rounds", type=int, default=3, help="times that a prompt is asked for until its feature fires"
    )
    parser.add_argument("--enough", type=int, default=2, help="seed examples that make a target covered")
    parser.add_argument("--features-at-once", type=int, default=16, help="features finished before the next ones begin")
    parser.add_argument("--temperature", type=float, default=1.0, help="of prompts and responses")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest prompt and response")
    parser.add_argument(
        "--confirm-kind",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the judge say whether a prompt should be declined",
    )
    parser.add_argument("--balance", action="store_true", help="as many examples of each of the four types")
    parser.add_argument("--max-texts", type=int, help="texts of seed data and natural text at most")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text at most")
    parser.add_argument("--k", type=int, help="k of TopK, where neither file nor release name says it")
    parser.add_argument("--seed", type=int, default=0, help="of what is held out and drawn")
    add_endpoint_options(parser)
    return parser
