"""`qscope synthesize`: training data for the features of a topic that existing data does not reach."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.options import (
    add_endpoint_options,
    check_endpoint_options,
    chosen,
    layers_of,
    load,
    load_saes,
    open_session,
)
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.parsing.table import MODEL, TEXT_LIST, add_options
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.text.inputs import read_text_list

if TYPE_CHECKING:
    from qscope_posttrain.endpoint.chat import PromptTemplates
    from qscope_posttrain.endpoint.session import ChatSession
    from qscope_posttrain.features.explain.explanation import Explanation, FeatureId
    from qscope_posttrain.synthesis.pipeline import Draft, Synthesis, SynthesisRun, SynthesisSettings

DATA = "data"
PROMPTS = "prompts.jsonl"
RELEVANCE = "relevance.csv"
PAGE = "report.html"
OPTIONS = f"""
--explanations: text required  # explanations.jsonl, or a FeatureSet with explanations
--topic: text required  # topic of the data, in a few words
--seed-data: text required  # existing data: {TEXT_LIST}
--output  # folder for the data, every prompt, answers, page and summary.json
--relevance: text  # CSV of layer, feature, relevance; by default the judge rates the explanations
--tau: float = 0.5  # minimum relevance of a target feature, 0 to 1
--held-out: float = 0.5  # share of targets kept apart, to measure coverage on
--measure-layers: text+  # further layers to measure coverage on; needs --natural
--natural: text  # texts by people on the topic, the control of natural sampling: {TEXT_LIST}
--random-control: yes|no = yes  # also write as many prompts without features, as control
--kinds: text+ = harmful benign  # kinds of prompts to write
--styles: text*  # styles of adversarial rewrites, each one argument; no values for no rewrites
--prompts-per-kind: int = 1  # vanilla prompts per feature and kind
--rounds: int = 3  # maximum number of attempts at a prompt that fires its feature
--enough: int = 2  # number of seed examples that make a target covered
--features-at-once: int = 16  # features to finish before the next ones begin
--temperature  # sampling temperature of prompts and responses
--max-new-tokens = 512  # maximum length of prompts and responses, in tokens
--confirm-kind: yes|no = yes  # ask the judge whether a prompt should be declined
--balance: switch  # keep equal numbers of examples of the four types
--max-texts --max-length --seed
"""


def synthesize(options: argparse.Namespace) -> None:
    """Choose targets, write prompts and responses, measure coverage; leave data, prompts, a page and a summary."""
    require_extra("analysis", "report")
    from qscope_posttrain.features.feature_set import read_explanations
    from qscope_posttrain.report.html import Figure, Section, write_html
    from qscope_posttrain.synthesis import coverage, report
    from qscope_posttrain.synthesis.coverage import FeatureReader, write_relevance
    from qscope_posttrain.synthesis.pipeline import Synthesis, synthesis_templates

    check_endpoint_options(options)
    settings = _settings(options)
    output = writable_folder(options.output)
    templates = synthesis_templates(options.templates)
    explanations = {entry.feature: entry for entry in read_explanations(options.explanations)}
    seed_texts = read_text_list(options.seed_data, options.max_texts)
    natural = [] if options.natural is None else read_text_list(options.natural, options.max_texts)
    random.Random(options.seed).shuffle(natural)
    if options.measure_layers and len(natural) < 2:
        raise UserValueError("--measure-layers counts the features that natural text fires; give --natural.")
    model, tokenizer = load(options)
    others = layers_of(options.measure_layers, model) if options.measure_layers else ()
    with open_session(options, output) as (session, judge):
        relevance, unreadable = _relevance(options, explanations, judge, templates)
        targets = coverage.target_features(relevance, options.tau)
        write_relevance(output / RELEVANCE, relevance)
        made_for, held_out = coverage.split_targets(targets, options.held_out, options.seed)
        if missing := [str(target) for target in made_for if target not in explanations]:
            raise UserValueError(
                f"{len(missing)} targets of the table have no explanation to write prompts from: "
                f"{', '.join(missing[:5])}."
            )
        layers = sorted({target.layer for target in targets})
        if set(layers) & set(others):
            raise UserValueError(f"prompts are verified on layers {layers}; --measure-layers must be others.")
        saes = load_saes(options, sorted({*layers, *others}), model)
        reader = FeatureReader(model, tokenizer, saes, max_length=options.max_length)
        seed_hits = coverage.firing(reader.features(seed_texts, layers=layers), targets)
        counts = dict(zip(targets, seed_hits.sum(axis=0).tolist(), strict=True))
        wanted = coverage.missing_first(made_for, [counts[target] for target in made_for], settings.enough)
        unseen = sum(counts[target] == 0 for target in wanted)
        status(
            f"{len(targets)} targets, {len(held_out)} of them held out; of the others the seed data misses "
            f"{unseen} and reaches {len(wanted) - unseen} fewer than {settings.enough} times"
        )
        if not wanted:
            raise UserValueError(
                f"the seed data fires every target {settings.enough} times; raise --enough or lower --tau."
            )
        synthesis = Synthesis(session, templates, settings, judge)
        made = synthesis.run(wanted, explanations, reader.verify)
        spent = session.usage.to_dict()
        drafts, asked = _random_control(options, made, Synthesis(session, templates, settings))
        usage = session.usage.to_dict()
    rows: Sequence[Mapping[str, Any]] = [report.example_row(example, relevance) for example in made.examples]
    rows = report.balanced(rows, options.seed) if options.balance else rows
    report.write_prompts(output / PROMPTS, made, drafts or [])
    if not rows:
        reason = made.stopped or f"{output / PROMPTS} holds what was written."
        raise UserValueError(f"no prompt fired its feature and was answered; {reason}")
    report.save_rows(rows, output / DATA)
    measured, drawn = report.measure(
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
    new_hits = coverage.firing(reader.features([row["prompt"][0]["content"] for row in rows], layers=layers), targets)
    tables = [report.examples_table(rows, made), report.target_table(targets, seed_hits, new_hits), *measured]
    for table in tables:
        table.print()
    figure = Figure(drawn, "Prompts of each strategy in random order.")
    write_html(output / PAGE, "Feature-driven synthesis", [Section("Coverage", tables=tables, figures=[figure])])
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


def build_parser() -> CommandParser:
    """The parser of `qscope synthesize`."""
    parser = CommandParser(call=synthesize, prog="qscope synthesize", description=__doc__)
    add_options(parser, MODEL, "--sae --k", OPTIONS)
    add_endpoint_options(parser)
    return parser


def _settings(options: argparse.Namespace) -> SynthesisSettings:
    from qscope_posttrain.synthesis.pipeline import STYLES, SynthesisSettings

    names = ("topic", "prompts_per_kind", "rounds", "enough", "features_at_once", "temperature", "confirm_kind")
    return SynthesisSettings(
        kinds=tuple(options.kinds),
        styles=STYLES if options.styles is None else tuple(options.styles),
        max_tokens=options.max_new_tokens,
        **chosen(options, *names),
    )


def _relevance(
    options: argparse.Namespace,
    explanations: Mapping[FeatureId, Explanation],
    judge: ChatSession,
    templates: PromptTemplates,
) -> tuple[Mapping[FeatureId, float], Sequence[FeatureId]]:
    """(relevance, features whose rating by the judge could not be read)."""
    from qscope_posttrain.synthesis.coverage import judge_relevance, read_relevance

    if options.relevance is not None:
        return read_relevance(options.relevance), ()
    relevance, unreadable = judge_relevance(judge, templates, list(explanations.values()), options.topic)
    if unreadable:
        status(
            f"{len(unreadable)} of {len(explanations)} features have no readable relevance and are left out: "
            f"{', '.join(map(str, unreadable[:5]))}"
        )
    return relevance, unreadable


def _random_control(
    options: argparse.Namespace, made: SynthesisRun, synthesis: Synthesis
) -> tuple[list[Draft] | None, int]:
    """(drafts, prompts asked for); nothing if it is switched off or the budget does not suffice."""
    from qscope_posttrain.endpoint.session import BudgetSpent

    if not options.random_control:
        return None, 0
    try:
        return synthesis.random(made.vanilla_drawn, made.drawn - made.vanilla_drawn), made.drawn
    except BudgetSpent as error:
        status(f"no random control: {error}")
        return None, 0
