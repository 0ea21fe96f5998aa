"""`qscope features find`, `contrast`, `rank` and `show`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.options import TEXT_LIST, add_sae_options, add_shared, layers_of, load
from qscope_posttrain.distributed import join_processes
from qscope_posttrain.errors import require_extra
from qscope_posttrain.files import read_text
from qscope_posttrain.report.progress import is_main_process, status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.report.tables import Table
from qscope_posttrain.text.inputs import read_text_list, read_texts

if TYPE_CHECKING:
    from qscope_posttrain.features.feature_set import FeatureSet


def find(options: argparse.Namespace) -> None:
    """Find the features of each language, print them, and write `features.safetensors` and `summary.json`."""
    from qscope_posttrain.features.find.contrast import find_language_features

    output = writable_folder(options.output)
    texts = read_texts(options.texts, options.max_texts)
    status("texts: " + ", ".join(f"{language} {len(entries)}" for language, entries in texts.items()))
    options.device = join_processes(options.device)
    model, tokenizer = load(options)
    names = ("top", "target", "causal", "k", "saes_at_once", "seed", "tokens_per_batch", "max_length")
    features = find_language_features(
        model,
        tokenizer,
        texts,
        dict.fromkeys(layers_of(options.layers, model), options.sae),
        checkpoint=output / "pass.checkpoint" if options.resumable else None,
        **{name: getattr(options, name) for name in names},
    )
    if not is_main_process():
        return
    features.to_table().print()
    causal = features.provenance.get("causal_check")
    if causal is not None:
        Table(**causal).print()
    _save(features, output, options, {"causal_check": causal})


def contrast(options: argparse.Namespace) -> None:
    """Find the features that distinguish two sets of texts, print them, and write them and `summary.json`."""
    from qscope_posttrain.features.find.contrast import find_contrastive_features

    output = writable_folder(options.output)
    positive = read_text_list(options.positive, options.max_texts)
    negative = read_text_list(options.negative, options.max_texts)
    names = (Path(options.positive).stem, Path(options.negative).stem) if options.names is None else options.names
    status(f"texts: {names[0]} {len(positive)}, {names[1]} {len(negative)}")
    model, tokenizer = load(options)
    features = find_contrastive_features(
        model,
        tokenizer,
        positive,
        negative,
        dict.fromkeys(layers_of(options.layers, model), options.sae),
        names=tuple(names),
        **{name: getattr(options, name) for name in ("top", "by", "common_tokens", "k", "max_length")},
    )
    features.to_table().print()
    _save(features, output, options, {})


def rank(options: argparse.Namespace) -> None:
    """Rank the features by one response, print them, and write them and `summary.json`."""
    require_extra("analysis")
    from qscope_posttrain.features.find.contrast import rank_response_features

    output = writable_folder(options.output)
    response = _text(options.response, options.response_file, "response")
    prompt = _text(options.prompt, options.prompt_file, "prompt") if options.prompt or options.prompt_file else ""
    reference = [] if options.reference is None else read_text_list(options.reference, options.max_texts)
    model, tokenizer = load(options)
    features = rank_response_features(
        model,
        tokenizer,
        response,
        dict.fromkeys(layers_of(options.layers, model), options.sae),
        prompt=prompt,
        reference=reference,
        **{name: getattr(options, name) for name in ("max_reference_rate", "by", "top", "k", "max_length")},
    )
    features.to_table().print()
    _save(features, output, options, {})


def show(options: argparse.Namespace) -> None:
    """Print a FeatureSet, or part of it, with its origin."""
    from qscope_posttrain.features.feature_set import FeatureSet
    from qscope_posttrain.features.find.repetition import REPETITION, repetition_table

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
        rows: list[list[Any]] = [
            [entry.layer, entry.feature_id, entry.model, entry.text] for entry in shown.explanations
        ]
        Table("Explanations", ["layer", "feature", "by", "explanation"], rows).print()
    print_steering(features)
    origins = [(f"layer {layer}", _origin(source)) for layer, source in features.provenance.get("saes", {}).items()]
    origins += [
        (f"found with {name}", value) for name, value in features.settings.items() if not isinstance(value, dict)
    ]
    origins += [(f"completions read: {name}", value) for name, value in features.provenance.get("loops", {}).items()]
    Table("Origin", ["what", "where"], [(what, str(where)) for what, where in origins]).print()


def print_steering(features: FeatureSet) -> None:
    """Print the steering curve and the choice made from it, where the features have them."""
    curve, chosen = features.provenance.get("steering_curve"), features.settings.get("steering")
    if curve is not None:
        Table(**curve).print()
    if isinstance(chosen, dict):
        shown = [(name, str(value) if isinstance(value, list) else value) for name, value in chosen.items()]
        Table("Steering, as chosen", ["what", "value"], shown).print()


def add_find_options(new: argparse.ArgumentParser) -> None:
    """Options of `qscope features find`."""
    add_sae_options(new)
    add_shared(new, "texts")
    new.add_argument("--top", type=int, default=2, help="features to keep per language and layer")
    new.add_argument("--target", help="language whose features are measured for their effect, such as zh")
    new.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --target: ablate and add its features, next to random ones and the difference of means",
    )
    add_shared(new, "output", "saes-at-once", "max-texts", "max-length", "tokens-per-batch")
    new.add_argument(
        "--resumable", action="store_true", help="write checkpoints, so that an interrupted pass can be resumed"
    )
    add_shared(new, "seed", help="seed for choosing the random control features")


def add_contrast_options(new: argparse.ArgumentParser) -> None:
    """Options of `qscope features contrast`."""
    _add_common(new)
    new.add_argument("--positive", required=True, help=f"texts with the property: {TEXT_LIST}")
    new.add_argument("--negative", required=True, help=f"texts without the property: {TEXT_LIST}")
    new.add_argument("--names", nargs=2, help="names of the two sets; by default those of the files")
    new.add_argument("--by", choices=("activation", "firing_rate"), default="activation", help="quantity to compare")
    new.add_argument("--common-tokens", type=int, default=0, help="ignore the N most frequent tokens")
    new.add_argument("--top", type=int, default=5, help="features to keep per layer")


def add_rank_options(new: argparse.ArgumentParser) -> None:
    """Options of `qscope features rank`."""
    _add_common(new)
    response = new.add_mutually_exclusive_group(required=True)
    response.add_argument("--response", help="the problematic response")
    response.add_argument("--response-file", help="file with the response")
    prompt = new.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="prompt of the response, read as context, exactly as the model saw it")
    prompt.add_argument("--prompt-file", help="file with the prompt")
    new.add_argument("--reference", help=f"ordinary texts, in which common features fire too: {TEXT_LIST}")
    new.add_argument(
        "--max-reference-rate", type=float, default=1.0, help="maximum share of reference tokens on which one may fire"
    )
    new.add_argument("--by", choices=("max", "mean"), default="max", help="activation over the response's tokens")
    new.add_argument("--top", type=int, default=10, help="features to keep per layer")


def _add_common(new: argparse.ArgumentParser) -> None:
    add_sae_options(new)
    add_shared(new, "output", "max-texts", "max-length")


def _save(features: FeatureSet, output: Path, options: argparse.Namespace, more: dict[str, Any]) -> None:
    path = features.save(output)
    results = {"features": path, "table": features.to_table(), **more, "provenance": features.provenance}
    write_summary(output, f"features {options.action}", vars(options), results)
    status(f"features written to {path}")


def _text(given: str | None, file: str | None, name: str) -> str:
    return read_text(str(file), f"--{name}-file") if given is None else given


def _origin(source: dict[str, Any]) -> str:
    parts = [source["location"], source.get("file"), source.get("revision")]
    digest = source.get("sha256")
    return " ".join(str(part) for part in parts if part) + (f" sha256 {digest[:16]}" if digest else "")
