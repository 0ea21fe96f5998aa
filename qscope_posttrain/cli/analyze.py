"""`qscope analyze redundancy` and `qscope analyze overlap`: benchmarks compared by the features of their items."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.options import chosen, layers_of, load, load_saes
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.parsing.table import SAES
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary

if TYPE_CHECKING:
    from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures
    from qscope_posttrain.analysis.benchmarks.items import BenchmarkItems
    from qscope_posttrain.report.html import Section

TOKENS = "tokens, no model"
COMMON = f"""
{SAES}
--benchmarks: text+ required  # a YAML file (see recipes/analysis), or NAME=SOURCE:FIELD for each; SOURCE is .jsonl,
    .csv or .tsv, also with .gz, a folder written by datasets, or a hub id; a template such as {{question}} may stand
    for FIELD
--prompt: text = {{text}}  # text around every item; \\n is a line break
--pooling: last|max|mean = last  # tokens of an item that count
--max-items: int  # maximum number of items per benchmark, the first ones
--max-length = 2048  # truncate each item to this many tokens; the end is kept
--tokens-per-batch
--correctness: text  # folder of <benchmark>.csv: one column per model, one row per item, 0 to 1
--level: float = 0.95  # confidence level of the intervals
--output --seed
"""
REDUNDANCY = """
--size: int  # items of the size-matched R-hat; by default half the smallest benchmark
--repeats: int = 100  # random item orders that check the exact curve and R
"""
OVERLAP = """
--scores: text  # CSV: one row per model with its name first, one column per benchmark
--control: text  # benchmark whose scores are partialled out, such as mmlu
--size: int  # items of the size-matched parts; by default as many as fit
--threshold: float = 0.9  # overlap from which one benchmark covers another
--token-control: switch  # repeat the analysis with token ids as features
"""


def redundancy(options: argparse.Namespace) -> None:
    """Measure how few items reach the features of a benchmark; with per-item correctness, how R and R-hat agree."""
    require_extra("analysis", "report")
    from qscope_posttrain.analysis.benchmarks import report
    from qscope_posttrain.analysis.benchmarks.performance import (
        performance_redundancy,
        read_performance,
        redundancy_agreement,
    )
    from qscope_posttrain.analysis.benchmarks.redundancy import measure_redundancy
    from qscope_posttrain.analysis.benchmarks.report import redundancy_section

    output = writable_folder(options.output)
    benchmarks = _read_benchmarks(options)
    correctness, _ = read_performance(_sizes(benchmarks), options.correctness)
    found, facts = _collect(options, benchmarks)
    performance = {
        name: performance_redundancy(name, correct, repeats=options.repeats, seed=options.seed)
        for name, (_, correct) in correctness.items()
    }
    results: dict[str, Any] = {"input": facts}
    sections: list[Section] = []
    if performance:
        report.performance_table(performance).print()
        results["performance"] = list(performance.values())
    size = min(_sizes(benchmarks).values()) // 2 if options.size is None else options.size
    settings = {"matched_size": size, "repeats": options.repeats, "level": options.level, "seed": options.seed}
    for layer, features in found.items():
        where = f"layer {layer}"
        measured = [measure_redundancy(entry, **settings) for entry in features]
        shown = [report.redundancy_table(measured, where, options.level)]
        results[f"layer_{layer}"] = {"redundancy": [entry.to_dict() for entry in measured]}
        if performance:
            lines, given_size = redundancy_agreement(measured, performance, seed=options.seed)
            known = math.isfinite(given_size)  # not where all benchmarks have the same size
            note = f"Partial rank correlation of R and R-hat given N: {given_size:.3f}." if known else ""
            shown.append(report.agreement_table(f"Redundancy by features and by performance, {where}", lines, note))
            results[f"layer_{layer}"] |= {"agreement": lines, "r_and_r_hat_given_n": given_size}
        for table in shown:
            table.print()
        if performance:
            shown.append(report.performance_table(performance))
        sections.append(redundancy_section(measured, where, shown))
    _write(options, output, results, sections, "Redundancy of benchmarks")


def overlap(options: argparse.Namespace) -> None:
    """Measure how much features of benchmarks overlap, recommend what to merge, keep or drop, compare with scores."""
    require_extra("analysis", "report")
    from qscope_posttrain.analysis.benchmarks import report
    from qscope_posttrain.analysis.benchmarks.overlap import measure_overlap
    from qscope_posttrain.analysis.benchmarks.performance import read_performance, similarity_agreement
    from qscope_posttrain.analysis.benchmarks.redundancy import measure_redundancy
    from qscope_posttrain.analysis.benchmarks.report import overlap_section, recommend

    output = writable_folder(options.output)
    benchmarks = _read_benchmarks(options)
    _, scores = read_performance(_sizes(benchmarks), options.correctness, options.scores)
    if options.control is not None and scores is None:
        raise UserValueError("--control is a column of the scores: give --scores or --correctness.")
    found, facts = _collect(options, benchmarks, options.token_control)
    results: dict[str, Any] = {"input": facts}
    sections: list[Section] = []
    for layer, features in found.items():
        where = layer if isinstance(layer, str) else f"layer {layer}"
        matrix = measure_overlap(features, size=options.size, level=options.level)
        redundant = {entry.name: measure_redundancy(entry, repeats=0) for entry in features}
        lines = recommend(matrix, redundant, options.threshold)
        shown = [report.overlap_table(matrix, where)]
        part: dict[str, Any] = {**matrix.to_dict(), "recommendation": lines}
        if len(features) > 2:
            shown.append(report.neighbor_table(matrix, where))
            part["nearest"] = {name: matrix.neighbor(name) for name in matrix.names}
        if scores is not None:
            agreements = similarity_agreement(matrix, _sizes(benchmarks), scores, options.control, seed=options.seed)
            note = f"Performance: Pearson correlation of scores over {len(scores.models)} models."
            shown.append(report.agreement_table(f"Overlap and performance, {where}", agreements, note))
            part["agreement"] = agreements
        shown.append(report.recommendation_table(lines, where, options.threshold))
        for table in shown:
            table.print()
        results[f"layer_{layer}" if isinstance(layer, int) else "tokens"] = part
        sections.append(overlap_section(matrix, where, shown))
    _write(options, output, results, sections, "Overlap of benchmarks")


def build_parser() -> CommandParser:
    """The parser of `qscope analyze`."""
    parser = CommandParser(prog="qscope analyze")
    parser.command(redundancy, COMMON, REDUNDANCY)
    parser.command(overlap, COMMON, OVERLAP)
    return parser


def _read_benchmarks(options: argparse.Namespace) -> list[BenchmarkItems]:
    from qscope_posttrain.analysis.benchmarks.items import benchmark_sources, read_items

    sources = benchmark_sources(options.benchmarks, options.max_items)
    return [read_items(source, options.prompt.replace("\\n", "\n")) for source in sources]


def _sizes(benchmarks: Sequence[BenchmarkItems]) -> dict[str, int]:
    return {benchmark.name: len(benchmark.texts) for benchmark in benchmarks}


def _collect(
    options: argparse.Namespace, benchmarks: Sequence[BenchmarkItems], token_control: bool = False
) -> tuple[dict[int | str, list[ItemFeatures]], dict[str, Any]]:
    """Feature sets by layer, with `token_control` also those of token ids; and the origin of all of it."""
    from qscope_posttrain.analysis.benchmarks.feature_sets import collect_item_features, token_sets
    from qscope_posttrain.provenance import model_shape, text_fingerprint

    model, tokenizer = load(options)
    saes = load_saes(options, layers_of(options.layers, model), model)
    settings = chosen(options, "pooling", "max_length", "tokens_per_batch")
    features = collect_item_features(model, tokenizer, benchmarks, saes, **settings)
    found: dict[int | str, list[ItemFeatures]] = dict(features.items())
    if token_control:
        found[TOKENS] = token_sets(tokenizer, benchmarks)
    origins = {}
    for entry in benchmarks:
        digest = text_fingerprint({entry.name: entry.texts})
        origins[entry.name] = {"source": entry.source, "items": len(entry.texts), "sha256": digest}
    sources = {str(layer): str(sae.source) for layer, sae in saes.items()}
    return found, {"model": model_shape(model), "saes": sources, "benchmarks": origins, "prompt": options.prompt}


def _write(
    options: argparse.Namespace, output: Path, results: dict[str, Any], sections: Sequence[Section], title: str
) -> None:
    from qscope_posttrain.report.html import write_html

    small_print = {name: json.dumps(value, ensure_ascii=False) for name, value in results["input"].items()}
    subtitle = f"{options.model}, pooling over tokens: {options.pooling}"
    report = write_html(output / "report.html", title, sections, subtitle, small_print)
    summary = write_summary(output, f"analyze {options.action}", vars(options), results)
    status(f"written to {summary} and {report}")
