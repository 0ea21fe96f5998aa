"""`qscope features find-repetition`: the features of endless repetition, tried by steering."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qscope_posttrain.cli.features.find import print_steering
from qscope_posttrain.cli.options import (
    chat_settings,
    check_one_process,
    chosen,
    layers_of,
    load,
    sampling_settings,
)
from qscope_posttrain.cli.parsing.table import PROMPTS, SAMPLING
from qscope_posttrain.errors import UserError, UserValueError, require_extra
from qscope_posttrain.models.loading import load_tokenizer
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary, write_text
from qscope_posttrain.report.tables import Table
from qscope_posttrain.text.inputs import read_prompts, read_text_list
from qscope_posttrain.text.jsonl import read_jsonl

if TYPE_CHECKING:
    from qscope_posttrain.features.find.loops import LoopCollection

LOOPS_FILE = "loops.jsonl"
OPTIONS = f"""
--output  # folder for features.safetensors, loops.jsonl and summary.json
--prompts: text  # prompts to sample loops from and to measure the steering curve on: {PROMPTS}
--loops: text  # JSONL of completions instead of sampling: prompt and completion, ids, or text
--benign: text  # JSONL with text: wanted repetition, for the firing rates of features in it
--max-prompts
--wanted: int = 20  # number of loops to sample
--max-samples: int = 4096  # maximum number of completions to sample for loops
--min-copies --min-tokens
--top: int = 4  # features to try per layer
--rank-by: difference|attribution|both = both  # rise of activation in the loop, effect on its probability, or the best
    of each in turn
--curve: yes|no = yes  # choose layer and strength by steering
--strengths: float+ = 0.5 0.75 1.0 1.25  # strengths to try, in median residual norms
--window-start: int{{2}} = 4 12  # lowest and highest first token that is steered
--window-lengths: int+  # numbers of steered tokens to try; 0 steers to the end; by default a quarter of
    --max-new-tokens
--fresh-samples: int = 256  # completions for the final check of the choice
--random-directions: int = 8  # number of random directions that are controls
--max-unlikely-share: float = 1.0  # maximum share of tokens with p < 0.001 at the chosen strength
{SAMPLING}
--samples = 64  # completions per point of the curve
--batch-size = 64
--tokens-per-batch --saes-at-once
"""


def find_repetition(options: argparse.Namespace) -> None:
    """Find the features, print both tables, and write features, loops, curves as SVG, and `summary.json`."""
    from qscope_posttrain.features.dose_curve import CurveSettings
    from qscope_posttrain.features.find.loops import collect_loops
    from qscope_posttrain.features.find.repetition import find_repetition_features, repetition_table
    from qscope_posttrain.features.find.repetition_curve import CURVE_KEY, curve_figures

    check_one_process("find-repetition runs")
    if options.prompts is None and options.loops is None:
        raise UserValueError("give --prompts, to sample on, or --loops, completions that are there already.")
    if options.prompts is not None and options.curve:
        require_extra("report")  # for the figures of the steering curve
    output = writable_folder(options.output)
    chat, prompts = chat_settings(options), None
    if options.prompts is not None:
        groups = read_prompts(options.prompts, options.max_prompts, language="all")
        prompts = [prompt for group in groups.values() for prompt in group]
    benign = None if options.benign is None else read_text_list(options.benign, jsonl=True)
    bounds = {"min_copies": options.min_copies, "min_tokens": options.min_tokens}
    loops = None if options.loops is None else _given_loops(options, bounds)
    sampling = sampling_settings(options, samples_per_prompt=1)
    curve = None
    if prompts is None:
        status("no --prompts: the steering curve is left out, so no layer and strength are chosen")
    elif options.curve:
        names = ("strengths", "window_start", "samples", "fresh_samples", "random_directions", "max_unlikely_share")
        curve = CurveSettings(
            window_lengths=options.window_lengths or (),
            sampling=sampling,
            **chosen(options, *names),
            **bounds,
        )
    model, tokenizer = load(options)
    layers = layers_of(options.layers, model)
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
        curve=curve,
        **chosen(options, "top", "rank_by", "k", "saes_at_once", "tokens_per_batch"),
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


def _given_loops(options: argparse.Namespace, bounds: dict[str, int]) -> LoopCollection:
    """The loops among the completions of --loops, before a model is loaded."""
    from qscope_posttrain.features.find.loops import loops_from_texts

    rows = [row for _, row in read_jsonl(options.loops)]
    tokenizer = load_tokenizer(options.model, options.revision)
    try:
        return loops_from_texts(tokenizer, rows, **bounds)
    except UserError as error:
        raise UserValueError(f"{options.loops}: {error}") from error
