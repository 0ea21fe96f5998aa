"""`qscope features find`, `find-repetition`, `contrast`, `rank`, `explain`, `tokens` and `show`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from qscope_posttrain.cli.features_contrast import add_contrast_options, add_rank_options, contrast, rank
from qscope_posttrain.cli.features_explain import add_explain_options, add_tokens_options, explain, tokens
from qscope_posttrain.cli.features_repetition import add_options, find_repetition, print_steering
from qscope_posttrain.cli.inputs import load_model, parse_layers, read_texts
from qscope_posttrain.cli.options import OptionParser, add_model_options
from qscope_posttrain.distributed import is_main_process, join_processes
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.report.tables import Table


def run(arguments: Sequence[str]) -> int:
    """Run the sub-command and return the exit status."""
    options = _parser().parse(arguments)
    if options.action == "show":
        show(options)
    elif options.action == "find-repetition":
        find_repetition(options)
    elif options.action == "contrast":
        contrast(options)
    elif options.action == "rank":
        rank(options)
    elif options.action == "explain":
        explain(options)
    elif options.action == "tokens":
        tokens(options)
    else:
        find(options)
    return 0


def find(options: argparse.Namespace) -> None:
    """Find the features, print them, and write `features.safetensors` and `summary.json`."""
    from qscope_posttrain.features.find.language import find_language_features
    from qscope_posttrain.models.layers import decoder_layers

    output = writable_folder(options.output)
    texts = read_texts(options.texts, options.max_texts)
    status("texts: " + ", ".join(f"{language} {len(entries)}" for language, entries in texts.items()))
    options.device = join_processes(options.device)
    model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
    layers = parse_layers(options.layers, len(decoder_layers(model)))
    features = find_language_features(
        model,
        tokenizer,
        texts,
        dict.fromkeys(layers, options.sae),
        top=options.top,
        target=options.target,
        causal=options.causal,
        k=options.k,
        saes_at_once=options.saes_at_once,
        seed=options.seed,
        checkpoint=output / "pass.checkpoint" if options.resumable else None,
        tokens_per_batch=options.tokens_per_batch,
        max_length=options.max_length,
    )
    if not is_main_process():
        return
    features.to_table().print()
    causal = features.provenance.get("causal_check")
    if causal is not None:
        Table(**causal).print()
    path = features.save(output)
    results = {
        "features": path,
        "table": features.to_table(),
        "causal_check": causal,
        "provenance": features.provenance,
    }
    write_summary(output, "features find", vars(options), results)
    status(f"features written to {path}")


def show(options: argparse.Namespace) -> None:
    """Print a FeatureSet, or part of it, with its origin."""
    from qscope_posttrain.features.feature_set import REPETITION, FeatureSet
    from qscope_posttrain.features.find.repetition import repetition_table

    features = FeatureSet.load(options.path)
    shown = features.select(options.language, options.layer, options.top)
    table = repetition_table(shown) if features.settings.get("selector") == REPETITION else shown.to_table()
    if options.markdown:
        print(table.to_markdown())
        return
    table.print()
    causal = features.provenance.get("causal_check")
    if causal is not None:
        Table(**causal).print()
    if features.explanations:
        Table("Explanations", ["layer", "feature", "by", "explanation"], _explanation_rows(shown)).print()
    print_steering(features)
    origins = [(f"layer {layer}", _origin(source)) for layer, source in features.provenance.get("saes", {}).items()]
    origins += [
        (f"found with {name}", value) for name, value in features.settings.items() if not isinstance(value, dict)
    ]
    origins += [(f"completions read: {name}", value) for name, value in features.provenance.get("loops", {}).items()]
    Table("Origin", ["what", "where"], [(what, str(where)) for what, where in origins]).print()


def _explanation_rows(features: Any) -> list[list[Any]]:
    return [[entry.layer, entry.feature_id, entry.model, entry.text] for entry in features.explanations]


def _origin(source: dict[str, Any]) -> str:
    parts = [source["location"], source.get("file"), source.get("revision")]
    digest = source.get("sha256")
    return " ".join(str(part) for part in parts if part) + (f" sha256 {digest[:16]}" if digest else "")


def _parser() -> OptionParser:
    parser = OptionParser(prog="qscope features")
    actions = parser.add_subparsers(dest="action", required=True)
    new = actions.add_parser(
        "find",
        help="find the features of each language in one pass over texts",
        description="One pass over texts. A launcher (accelerate launch, torchrun) may share it among processes.",
    )
    add_model_options(new)
    new.add_argument("--texts", required=True, help="folder of <language>.txt, or JSONL with text and language")
    new.add_argument("--sae", required=True, help="folder of layer files, file of one layer, or hub id of a release")
    new.add_argument("--layers", nargs="+", required=True, help="numbers from 0, ranges such as 20-27, or all")
    new.add_argument("--top", type=int, default=2, help="features a language and layer")
    new.add_argument("--target", help="language whose features are measured for their effect, for example zh")
    new.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --target, ablate and add its features, next to random ones and the difference of means",
    )
    new.add_argument("--output", required=True, help="folder for features.safetensors and summary.json")
    new.add_argument("--k", type=int, help="k of TopK, where neither file nor release name says it")
    new.add_argument("--saes-at-once", type=int, help="SAEs in memory at a time; each group of them is one pass")
    new.add_argument("--max-texts", type=int, help="texts a language at most")
    new.add_argument("--max-length", type=int, default=512, help="tokens of a text at most")
    new.add_argument("--tokens-per-batch", type=int, default=4096, help="tokens in one forward pass")
    new.add_argument("--resumable", action="store_true", help="keep a checkpoint, so that a killed pass goes on")
    new.add_argument("--seed", type=int, default=0, help="of the random controls")
    add_options(
        actions.add_parser(
            "find-repetition",
            help="find the features of endless repetition, and try them",
            description="Runs in one process, which samples in turn: not under a launcher.",
        )
    )
    add_contrast_options(actions.add_parser("contrast", help="find the features that tell two sets of texts apart"))
    add_rank_options(actions.add_parser("rank", help="rank features by their activation on one response"))
    add_explain_options(actions.add_parser("explain", help="let a chat model explain features, and test what it says"))
    add_tokens_options(actions.add_parser("tokens", help="show token by token where features fire in some texts"))
    old = actions.add_parser("show", help="print a FeatureSet")
    old.add_argument("path", help="features.safetensors, or the folder that holds it")
    old.add_argument("--language", help="rows of this language only")
    old.add_argument("--layer", type=int, nargs="+", help="rows of these layers only")
    old.add_argument("--top", type=int, help="the best so many rows of each language and layer")
    old.add_argument("--markdown", action="store_true", help="as a Markdown table")
    return parser
