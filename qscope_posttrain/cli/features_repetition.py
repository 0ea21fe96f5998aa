"""`qscope features find-repetition`, and how `qscope features show` shows what it has written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.inputs import load_model, load_tokenizer, parse_layers, read_prompts, template_options
from qscope_posttrain.cli.options import add_model_options
from qscope_posttrain.distributed import launched_processes
from qscope_posttrain.errors import UserError, UserValueError, require_extra
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary, write_text
from qscope_posttrain.report.tables import Table
from qscope_posttrain.text.jsonl import read_jsonl

if TYPE_CHECKING:
    from qscope_posttrain.features.feature_set import FeatureSet
    from qscope_posttrain.features.find.loops import LoopCollection

LOOPS_FILE = "loops.jsonl"


def find_repetition(options: argparse.Namespace) -> None:
    """Find the features, print both tables, and write features, loops, curves as SVG, and `summary.json`."""
    from qscope_posttrain.features.find.loops import collect_loops
    from qscope_posttrain.features.find.repetition import find_repetition_features, repetition_table
    from qscope_posttrain.features.find.repetition_curve import CurveSettings
    from qscope_posttrain.features.find.repetition_figure import CURVE_KEY, curve_figures
    from qscope_posttrain.models.generation import SamplingSettings
    from qscope_posttrain.models.layers import decoder_layers

    if launched_processes() > 1:
        raise UserValueError("find-repetition runs in one process; start it without a launcher.")
    if options.prompts is None and options.loops is None:
        raise UserValueError("give --prompts, to sample on, or --loops, completions that are there already.")
    if options.prompts is not None and options.curve:
        require_extra("report")  # for the figures of the steering curve
    output = writable_folder(options.output)
    chat: dict[str, Any] = {
        "chat": options.chat,
        "chat_template_options": template_options(options.chat_template_options),
    }
    prompts = None
    if options.prompts is not None:
        groups = read_prompts(options.prompts, options.max_prompts, language="all")
        prompts = [prompt for group in groups.values() for prompt in group]
    benign = None if options.benign is None else _benign(options.benign)
    bounds = {"min_copies": options.min_copies, "min_tokens": options.min_tokens}
    loops = None if options.loops is None else _given_loops(options, bounds)
    sampling = SamplingSettings(
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        batch_size=options.batch_size,
        samples_per_prompt=1,
    )
    curve = None
    if prompts is None:
        status("no --prompts: the steering curve is left out, so no layer and strength are chosen")
    elif options.curve:
        curve = CurveSettings(
            strengths=options.strengths,
            window_start=options.window_start,
            window_lengths=options.window_lengths or (),
            samples=options.samples,
            fresh_samples=options.fresh_samples,
            random_directions=options.random_directions,
            max_unlikely_share=options.max_unlikely_share,
            sampling=sampling,
            **bounds,
        )
    model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
    layers = parse_layers(options.layers, len(decoder_layers(model)))
    if loops is None:
        limits = {"wanted": options.wanted, "max_samples": options.max_samples}
        loops = collect_loops(model, tokenizer, prompts or [], settings=sampling, **limits, **bounds, **chat)
    loops_path = loops.write(output / LOOPS_FILE, tokenizer)
    status(f"{loops.summary()}; written to {loops_path}")
    features = find_repetition_features(
        model,
        tokenizer,
        dict.fromkeys(layers, options.sae),
        prompts,
        loops=loops,
        benign=benign,
        top=options.top,
        rank_by=options.rank_by,
        curve=curve,
        k=options.k,
        saes_at_once=options.saes_at_once,
        tokens_per_batch=options.tokens_per_batch,
        **chat,
    )
    path = features.save(output)
    Table(**features.provenance["ranking"]).print()
    print_steering(features)
    figures = []
    for layer, svg in curve_figures(features).items():
        figures.append(output / f"steering_curve_layer{layer}.svg")
        write_text(figures[-1], svg)
    results = {
        "features": path,
        "table": repetition_table(features),
        "ranking": features.provenance["ranking"],
        "loops": {"file": loops_path, **features.provenance["loops"]},
        "steering": features.settings.get("steering"),
        "steering_curve": features.provenance.get(CURVE_KEY),
        "figures": figures,
        "provenance": features.provenance,
    }
    write_summary(output, "features find-repetition", vars(options), results)
    status(f"features written to {path}")


def print_steering(features: FeatureSet) -> None:
    """The steering curve and what was chosen from it, where the features have them."""
    curve, chosen = features.provenance.get("steering_curve"), features.settings.get("steering")
    if curve is not None:
        Table(**curve).print()
    if isinstance(chosen, dict):
        shown = [(name, str(value) if isinstance(value, list) else value) for name, value in chosen.items()]
        Table("Steering, as chosen", ["what", "value"], shown).print()


def add_options(new: argparse.ArgumentParser) -> None:
    """Options of `find-repetition`."""
    add_model_options(new)
    new.add_argument("--sae", required=True, help="folder of layer files, file of one layer, or hub id of a release")
    new.add_argument("--layers", nargs="+", required=True, help="numbers from 0, ranges such as 20-27, or all")
    new.add_argument("--output", required=True, help="folder for features.safetensors, loops.jsonl and summary.json")
    new.add_argument("--prompts", help="JSONL with prompt (text or chat): to sample loops, and for the steering curve")
    new.add_argument("--loops", help="JSONL of completions instead of sampling: prompt and completion, ids, or text")
    new.add_argument("--benign", help="JSONL with text: repetition that is wanted, for its firing rates")
    new.add_argument("--max-prompts", type=int, help="prompts a language at most")
    new.add_argument("--wanted", type=int, default=20, help="loops to sample")
    new.add_argument("--max-samples", type=int, default=4096, help="completions after which to give up")
    new.add_argument("--min-copies", type=int, default=4, help="whole copies of a block at the end that make a loop")
    new.add_argument("--min-tokens", type=int, default=12, help="tokens that these copies have together, at least")
    new.add_argument("--top", type=int, default=4, help="features of each layer that are tried")
    new.add_argument(
        "--rank-by",
        choices=("difference", "attribution", "both"),
        default="both",
        help="rise of activation in the loop, effect on its probability, or the best of each in turn",
    )
    new.add_argument(
        "--curve", action=argparse.BooleanOptionalAction, default=True, help="choose layer and strength by steering"
    )
    new.add_argument(
        "--strengths", type=float, nargs="+", default=[0.5, 0.75, 1.0, 1.25], help="in median residual norms"
    )
    new.add_argument(
        "--window-start", type=int, nargs=2, default=[4, 12], help="lowest and highest first token that is steered"
    )
    new.add_argument(
        "--window-lengths", type=int, nargs="+", help="tokens that are steered, 0 to the end; a quarter by default"
    )
    new.add_argument("--samples", type=int, default=64, help="completions for each point of the curve")
    new.add_argument("--fresh-samples", type=int, default=256, help="completions for the final check of the choice")
    new.add_argument("--random-directions", type=int, default=8, help="random directions that serve as control")
    new.add_argument(
        "--max-unlikely-share", type=float, default=1.0, help="tokens with p < 0.001 that the choice may have at most"
    )
    new.add_argument("--temperature", type=float, default=1.0, help="of the sampling")
    new.add_argument("--top-p", type=float, default=1.0, help="nucleus; 1 keeps all tokens")
    new.add_argument("--max-new-tokens", type=int, default=256, help="longest completion")
    new.add_argument("--batch-size", type=int, default=64, help="completions generated at a time")
    new.add_argument("--tokens-per-batch", type=int, default=4096, help="tokens in one forward pass")
    new.add_argument("--chat", action="store_true", help="send texts through the chat template, as a user's message")
    new.add_argument("--chat-template-options", help='JSON for the template, for example {"enable_thinking": false}')
    new.add_argument("--k", type=int, help="k of TopK, where neither file nor release name says it")
    new.add_argument("--saes-at-once", type=int, help="SAEs in memory at a time; each group of them is one pass")
    new.add_argument("--seed", type=int, default=0, help="of the sampling and the random directions")


def _given_loops(options: argparse.Namespace, bounds: dict[str, int]) -> LoopCollection:
    """The loops among the completions of --loops, before a model is loaded."""
    from qscope_posttrain.features.find.loops import loops_from_texts

    rows = [row for _, row in read_jsonl(options.loops)]
    tokenizer = load_tokenizer(options.model, options.revision)
    try:
        return loops_from_texts(tokenizer, rows, **bounds)
    except UserError as error:
        raise UserValueError(f"{options.loops}: {error}") from error


def _benign(path: str | Path) -> list[str]:
    texts = []
    for number, row in read_jsonl(path):
        if not isinstance(row.get("text"), str):
            raise UserValueError(f"{path}, line {number}: expected a string 'text', got the keys {sorted(row)}.")
        texts.append(row["text"])
    if not texts:
        raise UserValueError(f"'{path}' has no text.")
    return texts
