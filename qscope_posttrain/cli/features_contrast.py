"""`qscope features contrast` and `qscope features rank`: which features are behind what a model does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qscope_posttrain.cli.inputs import load_model, parse_layers, read_text_list
from qscope_posttrain.cli.options import add_model_options
from qscope_posttrain.errors import require_extra
from qscope_posttrain.files import read_text
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary

if TYPE_CHECKING:
    from qscope_posttrain.features.feature_set import FeatureSet


def contrast(options: argparse.Namespace) -> None:
    """Find the features, print them, and write the FeatureSet and `summary.json`."""
    from qscope_posttrain.features.find.contrast import find_contrastive_features
    from qscope_posttrain.models.layers import decoder_layers

    output = writable_folder(options.output)
    positive = read_text_list(options.positive, options.max_texts)
    negative = read_text_list(options.negative, options.max_texts)
    names = (Path(options.positive).stem, Path(options.negative).stem) if options.names is None else options.names
    status(f"texts: {names[0]} {len(positive)}, {names[1]} {len(negative)}")
    model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
    features = find_contrastive_features(
        model,
        tokenizer,
        positive,
        negative,
        dict.fromkeys(parse_layers(options.layers, len(decoder_layers(model))), options.sae),
        top=options.top,
        by=options.by,
        names=tuple(names),
        common_tokens=options.common_tokens,
        k=options.k,
        max_length=options.max_length,
    )
    _finish(features, output, "features contrast", options)


def rank(options: argparse.Namespace) -> None:
    """Rank the features, print them, and write the FeatureSet and `summary.json`."""
    from qscope_posttrain.features.find.contrast import rank_response_features
    from qscope_posttrain.models.layers import decoder_layers

    require_extra("analysis")
    output = writable_folder(options.output)
    response = _text(options.response, options.response_file, "response")
    prompt = _text(options.prompt, options.prompt_file, "prompt") if options.prompt or options.prompt_file else ""
    reference = [] if options.reference is None else read_text_list(options.reference, options.max_texts)
    model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
    features = rank_response_features(
        model,
        tokenizer,
        response,
        dict.fromkeys(parse_layers(options.layers, len(decoder_layers(model))), options.sae),
        prompt=prompt,
        reference=reference,
        max_reference_rate=options.max_reference_rate,
        by=options.by,
        top=options.top,
        k=options.k,
        max_length=options.max_length,
    )
    _finish(features, output, "features rank", options)


def _finish(features: FeatureSet, output: Path, command: str, options: argparse.Namespace) -> None:
    table = features.to_table()
    table.print()
    path = features.save(output)
    results = {"features": path, "table": table, "provenance": features.provenance}
    write_summary(output, command, vars(options), results)
    status(f"features written to {path}")


def _text(given: str | None, file: str | None, name: str) -> str:
    if given is not None:
        return given
    return read_text(str(file), f"--{name}-file")


def add_contrast_options(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--positive", required=True, help="texts that show it: one a line, or JSONL with text")
    parser.add_argument("--negative", required=True, help="texts that do not")
    parser.add_argument("--names", nargs=2, help="what to call the two sets; by default the names of the files")
    parser.add_argument("--by", choices=("activation", "firing_rate"), default="activation", help="what is compared")
    parser.add_argument("--common-tokens", type=int, default=0, help="the so many most frequent tokens do not count")
    parser.add_argument("--top", type=int, default=5, help="features a layer")


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    response = parser.add_mutually_exclusive_group(required=True)
    response.add_argument("--response", help="the problematic response")
    response.add_argument("--response-file", help="a file with it")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="what it answered, read as context; as the model saw it, template included")
    prompt.add_argument("--prompt-file", help="a file with it")
    parser.add_argument("--reference", help="ordinary texts, one a line or JSONL: how often a feature fires anyway")
    parser.add_argument("--max-reference-rate", type=float, default=1.0, help="largest share of reference tokens")
    parser.add_argument("--by", choices=("max", "mean"), default="max", help="activation over the response's tokens")
    parser.add_argument("--top", type=int, default=10, help="features a layer")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--sae", required=True, help="folder of layer files, file of one layer, or hub id of a release")
    parser.add_argument("--layers", nargs="+", required=True, help="numbers from 0, ranges such as 20-27, or all")
    parser.add_argument("--output", required=True, help="folder for features.safetensors and summary.json")
    parser.add_argument("--k", type=int, help="k of TopK, where neither file nor release name says it")
    parser.add_argument("--max-texts", type=int, help="texts a set at most")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text at most")
