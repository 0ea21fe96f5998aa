"""`qscope analyze redundancy` and `qscope analyze overlap`: what the items of benchmarks make features do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.analyze_inputs import add_options, collect, read_benchmarks, read_performance
from qscope_posttrain.cli.options import OptionParser
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary

if TYPE_CHECKING:
    from qscope_posttrain.report.html import Section


def run(arguments: Sequence[str]) -> int:
    """Run the sub-command and return the exit status."""
    options = _parser().parse(arguments)
    require_extra("analysis", "report")
    {"redundancy": redundancy, "overlap": overlap}[options.action](options)
    return 0


def redundancy(options: argparse.Namespace) -> None:
    """R-hat and coverage of every benchmark; with per-item correctness R, and how the two go together."""
    from qscope_posttrain.analysis.benchmarks import tables
    from qscope_posttrain.analysis.benchmarks.agreement import redundancy_agreement
    from qscope_posttrain.analysis.benchmarks.performance import performance_redundancy
    from qscope_posttrain.analysis.benchmarks.redundancy import measure_redundancy
    from qscope_posttrain.analysis.benchmarks.report_page import agreement_figure, redundancy_section

    output = writable_folder(options.output)
    benchmarks = read_benchmarks(options)
    correctness, _ = read_performance(options, benchmarks)
    found, facts = collect(options, benchmarks)
    performance = {
        name: performance_redundancy(name, correct, repeats=options.repeats, seed=options.seed)
        for name, (_, correct) in correctness.items()
    }
    results: dict[str, Any] = {"input": facts}
    sections: list[Section] = []
    if performance:
        table = tables.performance_table(performance)
        table.print()
        results["performance"] = list(performance.values())
    size = min(len(entry.texts) for entry in benchmarks) // 2 if options.size is None else options.size
    for layer, features in found.items():
        where = f"layer {layer}"
        measured = [
            measure_redundancy(
                entry, matched_size=size, repeats=options.repeats, level=options.level, seed=options.seed
            )
            for entry in features
        ]
        shown = [tables.redundancy_table(measured, where, options.level)]
        results[f"layer_{layer}"] = {"redundancy": [entry.to_dict() for entry in measured]}
        figures = []
        if performance:
            lines, given_size = redundancy_agreement(measured, performance, seed=options.seed)
            note = f"Partial rank correlation of R and R-hat given N: {given_size:.3f}."
            shown.append(tables.agreement_table(f"Redundancy by features and by performance, {where}", lines, note))
            results[f"layer_{layer}"] |= {"agreement": lines, "r_and_r_hat_given_n": given_size}
            both = [entry for entry in measured if entry.name in performance]
            names = [entry.name for entry in both]
            r = [performance[name].r for name in names]
            figures.append(agreement_figure(names, [entry.r_hat.estimate for entry in both], r, "R-hat", "R"))
        for table in shown:
            table.print()
        if performance:
            shown.append(tables.performance_table(performance))
        sections.append(redundancy_section(measured, where, shown, figures))
    _write(options, output, results, sections, "Redundancy of benchmarks", facts)


def overlap(options: argparse.Namespace) -> None:
    """Overlaps of all pairs, nearest benchmarks, a recommendation; with scores, how overlap and performance agree."""
    from qscope_posttrain.analysis.benchmarks import tables
    from qscope_posttrain.analysis.benchmarks.agreement import similarity_agreement
    from qscope_posttrain.analysis.benchmarks.overlap import measure_overlap
    from qscope_posttrain.analysis.benchmarks.recommendation import recommend
    from qscope_posttrain.analysis.benchmarks.redundancy import measure_redundancy
    from qscope_posttrain.analysis.benchmarks.report_page import overlap_results, overlap_section

    output = writable_folder(options.output)
    benchmarks = read_benchmarks(options)
    _, scores = read_performance(options, benchmarks)
    if options.control is not None and scores is None:
        raise UserValueError("--control is a column of the scores: give --scores or --correctness.")
    found, facts = collect(options, benchmarks, options.token_control)
    sizes = {benchmark.name: len(benchmark.texts) for benchmark in benchmarks}
    results: dict[str, Any] = {"input": facts}
    sections: list[Section] = []
    for layer, features in found.items():
        where = layer if isinstance(layer, str) else f"layer {layer}"
        matrix = measure_overlap(features, size=options.size, level=options.level)
        redundant = {entry.name: measure_redundancy(entry, repeats=0) for entry in features}
        lines = recommend(matrix, redundant, scores, options.threshold)
        shown = [tables.overlap_table(matrix, where)]
        part: dict[str, Any] = {**overlap_results(matrix), "recommendation": lines}
        if len(features) > 2:
            shown.append(tables.neighbour_table(matrix, where))
            part["nearest"] = {name: matrix.neighbour(name) for name in matrix.names}
        if scores is not None:
            agreements = similarity_agreement(matrix, sizes, scores, options.control, seed=options.seed)
            note = f"Performance: Pearson correlation of scores over {len(scores.models)} models."
            shown.append(tables.agreement_table(f"Overlap and performance, {where}", agreements, note))
            part["agreement"] = agreements
        shown.append(tables.recommendation_table(lines, where, options.threshold))
        for table in shown:
            table.print()
        results[f"layer_{layer}" if isinstance(layer, int) else "tokens"] = part
        sections.append(overlap_section(matrix, where, shown))
    _write(options, output, results, sections, "Overlap of benchmarks", facts)


def _write(
    options: argparse.Namespace,
    output: Any,
    results: dict[str, Any],
    sections: Sequence[Section],
    title: str,
    facts: dict[str, Any],
) -> None:
    from qscope_posttrain.report.html import write_html

    small_print = {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}
    subtitle = f"{options.model}, pooling over tokens: {options.pooling}"
    report = write_html(output / "report.html", title, sections, subtitle, small_print)
    summary = write_summary(output, f"analyze {options.action}", vars(options), results)
    status(f"written to {summary} and {report}")


def _parser() -> OptionParser:
    parser = OptionParser(prog="qscope analyze")
    actions = parser.add_subparsers(dest="action", required=True)
    new = actions.add_parser("redundancy", help="how few items reach the features of a benchmark: R-hat, coverage")
    add_options(new)
    new.add_argument("--size", type=int, help="items of the size-matched R-hat; half of the smallest benchmark")
    new.add_argument("--repeats", type=int, default=100, help="random orders that check the exact curve, and behind R")
    new = actions.add_parser("overlap", help="how much the features of benchmarks overlap; merge, keep or drop")
    add_options(new)
    new.add_argument("--scores", help="CSV: a row a model with its name first, a column a benchmark")
    new.add_argument("--control", help="benchmark whose scores are partialled out, for example mmlu")
    new.add_argument("--size", type=int, help="items of the size-matched parts; by default the most that fit")
    new.add_argument("--threshold", type=float, default=0.9, help="share of itself from which one covers another")
    new.add_argument("--token-control", action="store_true", help="the same with token ids in the place of features")
    return parser
