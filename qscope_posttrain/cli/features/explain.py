"""`qscope features explain` and `qscope features tokens`: words for features, and where they fire."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.options import check_endpoint_options, layers_of, load, load_saes, open_session
from qscope_posttrain.cli.parsing.table import TEXT_LIST
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_rows, write_summary
from qscope_posttrain.text.inputs import read_text_list

if TYPE_CHECKING:
    from torch import nn

    from qscope_posttrain.features.explain.explanation import Explained
    from qscope_posttrain.features.feature_set import FeatureSet

EXPLANATIONS = "explanations.jsonl"
PAGE = "explanations.html"
EXPLAIN = f"""
--texts  # natural text: {TEXT_LIST}
--features optional  # FeatureSet to explain; a copy with the explanations is written
--layers optional  # without --features: layer numbers from 0, ranges such as 20-27, or all
--feature-ids: int+  # without --features: ids, the same in every layer
--output  # folder for the explanations, their page and summary.json
--methods: text* = detection fuzzing  # tests: detection, fuzzing, or none
--tests: int = 20  # held-out contexts of each kind per score
--control: yes|no = yes  # judge every feature's contexts also by the words for another feature
--min-texts: int = 5  # skip features that fire on fewer texts
--max-texts --max-length --seed
"""
TOKENS = f"""
--features
--text: text+  # texts, each one argument
--texts optional  # texts in a file: {TEXT_LIST}
--sae optional  # SAE whose activations to show; by default pre-activations above zero
--language --layer --top
--html: text  # HTML page to write
--max-texts --max-length --k
"""


def explain(options: argparse.Namespace) -> None:
    """Let a chat model explain features, and test what it says; write explanations, a page of contexts, a summary."""
    require_extra("report")
    from qscope_posttrain.features.explain.ask import ExplainSettings, explain_features, explain_templates
    from qscope_posttrain.features.explain.contexts import ContextSettings
    from qscope_posttrain.features.feature_set import FeatureSet

    check_endpoint_options(options)
    output = writable_folder(options.output)
    templates = explain_templates(options.templates)
    texts = read_text_list(options.texts, options.max_texts)
    features = None if options.features is None else FeatureSet.load(options.features)
    settings = ExplainSettings(
        contexts=ContextSettings(absent=2 * options.tests, seed=options.seed),
        tests=options.tests,
        methods=() if options.methods == ["none"] else tuple(options.methods),
        control=options.control,
        min_texts=options.min_texts,
        seed=options.seed,
    )
    model, tokenizer = load(options)
    ids = _chosen(options, features, model)
    saes = load_saes(options, list(ids), model)
    with open_session(options, output) as (session, judge):
        more = {"judge": judge, "templates": templates, "max_length": options.max_length}
        found = explain_features(model, tokenizer, texts, saes, ids, session, settings, **more)
        usage = session.usage.to_dict()
    for table in (found.to_table(), found.summary_table()):
        table.print()
    for feature, reason in found.skipped.items():
        status(f"{feature} is not explained: {reason}")
    written = write_rows(output / EXPLANATIONS, (entry.to_dict() for entry in found.explanations))
    if features is not None:
        features.explained(found.explanations).save(output)
    page = _write_page(found, tokenizer, output / PAGE)
    results = {
        "explanations": written,
        "table": found.to_table(),
        "tested": found.summary_table(),
        "skipped": {str(feature): reason for feature, reason in found.skipped.items()},
        "usage": usage,
    }
    write_summary(output, "features explain", vars(options), results)
    status(f"explanations written to {written}, their contexts to {page}")


def tokens(options: argparse.Namespace) -> None:
    """Show token by token, on the terminal and if asked on a page, where features fire in texts."""
    from qscope_posttrain.features.explain.contexts import token_view
    from qscope_posttrain.features.feature_set import FeatureSet
    from qscope_posttrain.report.html import Section, print_shaded, write_html

    if (options.text is None) == (options.texts is None):
        raise UserValueError("give --text, words on the command line, or --texts, a file.")
    if options.html is not None:
        require_extra("report")
    texts = options.text or read_text_list(options.texts, options.max_texts)
    features = FeatureSet.load(options.features).select(options.language, options.layer, options.top)
    model, tokenizer = load(options)
    saes = load_saes(options, list(features.layers), model) if options.sae else None
    groups = token_view(model, tokenizer, texts, features, saes, max_length=options.max_length)
    for group in groups:
        print_shaded(group)
    if options.html is not None:
        note = "Activations." if saes else "Positive parts of pre-activations: without an SAE, before its top-k."
        sections = [Section("Features by token", note, shaded=groups)]
        status(f"page written to {write_html(options.html, 'Where features fire', sections)}")


def _chosen(options: argparse.Namespace, features: FeatureSet | None, model: nn.Module) -> dict[int, list[int]]:
    """{layer: feature ids}, from the FeatureSet or from the options."""
    from qscope_posttrain.features.layer_features import FREE_DIRECTION

    if features is None:
        if not options.layers or not options.feature_ids:
            raise UserValueError("give --features, or --layers and --feature-ids.")
        return {layer: list(dict.fromkeys(options.feature_ids)) for layer in layers_of(options.layers, model)}
    if options.layers or options.feature_ids:
        raise UserValueError("--features says which features; leave out --layers and --feature-ids.")
    found = {
        layer: [feature for feature in dict.fromkeys(rows.feature_ids.tolist()) if feature != FREE_DIRECTION]
        for layer, rows in features.layers.items()
    }
    if not any(found.values()):
        raise UserValueError("these features are free directions; only features of an SAE can be explained.")
    return {layer: ids for layer, ids in found.items() if ids}


def _write_page(found: Explained, tokenizer: Any, path: Path) -> Path:
    from qscope_posttrain.features.explain.contexts import text_pieces
    from qscope_posttrain.features.explain.explanation import FeatureId
    from qscope_posttrain.report.html import Section, ShadedText, ShadedTexts, write_html

    words = {entry.feature: entry.text for entry in found.explanations}
    sections = [Section("Explanations", tables=[found.summary_table(), found.to_table()])]
    for entry in found.contexts:
        feature = FeatureId(entry.layer, entry.feature_id)
        passages = [ShadedText(*text_pieces(tokenizer, context.ids, context.values)) for context in entry.top]
        shaded = [ShadedTexts("strongest contexts", passages)] if passages else []
        body = words.get(feature, f"Not explained: {found.skipped.get(feature, '')}.")
        sections.append(Section(str(feature), body, shaded=shaded))
    return write_html(path, "What features stand for", sections)
