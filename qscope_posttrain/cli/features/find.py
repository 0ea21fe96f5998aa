"""`qscope features find`, `find-repetition`, `contrast`, `rank` and `show`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.options import chat_settings, check_one_process, chosen, layers_of, load, sampling_settings
from qscope_posttrain.cli.parsing.table import PROMPTS, SAMPLING, TEXT_LIST
from qscope_posttrain.distributed import join_processes
from qscope_posttrain.errors import UserError, UserValueError, naming_what_is_kept, require_extra
from qscope_posttrain.files import read_jsonl, read_text
from qscope_posttrain.models.loading import load_tokenizer
from qscope_posttrain.report.progress import is_main_process, status
from qscope_posttrain.report.summary import writable_folder, write_summary, write_text
from qscope_posttrain.report.tables import Table
from qscope_posttrain.text.inputs import read_prompts, read_text_list, read_texts

if TYPE_CHECKING:
    from qscope_posttrain.features.feature_set import FeatureSet
    from qscope_posttrain.features.find.loops import LoopCollection

LOOPS_FILE = "loops.jsonl"
CHECKPOINT = "pass.checkpoint"
FIND = """
--texts
--top: int = 2  # features to keep per language and layer
--target: text  # language whose features are measured for their effect, such as zh
--causal: yes|no = yes  # with --target: ablate and add its features, next to random ones and the difference of means
--output --saes-at-once --max-texts --max-length --tokens-per-batch
--resumable: switch  # write checkpoints, so that an interrupted pass can be resumed
--seed  # seed for choosing the random control features
"""
FIND_REPETITION = f"""
--output  # folder for features.safetensors, loops.jsonl and summary.json
--prompts: text  # prompts to sample loops from and to measure the steering curve on: {PROMPTS}
--loops: text  # JSONL of completions instead of sampling: examples of `qscope evaluate repetition`, ids, or text
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
TEXTS = "--output --max-texts --max-length"
CONTRAST = f"""
--positive: text required  # texts with the property: {TEXT_LIST}
--negative: text required  # texts without the property: {TEXT_LIST}
--names: text{{2}}  # names of the two sets; by default those of the files
--by: activation|firing_rate = activation  # quantity to compare
--common-tokens: int = 0  # ignore the N most frequent tokens
--top: int = 5  # features to keep per layer
"""
RANK = f"""
--reference: text  # ordinary texts, in which common features fire too: {TEXT_LIST}
--max-reference-rate: float = 1.0  # maximum share of reference tokens on which one may fire
--by: max|mean = max  # activation over the response's tokens
--top: int = 10  # features to keep per layer
"""
RESPONSE = """
--response: text  # the problematic response
--response-file: text  # file with the response
"""
PROMPT = """
--prompt: text  # prompt of the response, read as context, exactly as the model saw it
--prompt-file: text  # file with the prompt
"""
SHOW = """
path: text  # features.safetensors, or the folder that holds it
--language --layer --top --markdown
"""


def find(options: argparse.Namespace) -> None:
    """Find the features of each language, print them, and write `features.safetensors` and `summary.json`.

    One pass over texts, which a launcher (accelerate launch, torchrun) may share among processes.
    """
    from qscope_posttrain.features.find.contrast import find_language_features

    output = writable_folder(options.output)
    texts = read_texts(options.texts, options.max_texts)
    status("texts: " + ", ".join(f"{language} {len(entries)}" for language, entries in texts.items()))
    options.device = join_processes(options.device)
    model, tokenizer = load(options)
    with naming_what_is_kept(lambda: _kept(output, options.resumable)):
        features = find_language_features(
            model,
            tokenizer,
            texts,
            dict.fromkeys(layers_of(options.layers, model), options.sae),
            checkpoint=output / CHECKPOINT if options.resumable else None,
            keep_checkpoint=options.resumable,
            **chosen(options, "top", "target", "causal", "k", "saes_at_once", "seed", "tokens_per_batch", "max_length"),
        )
    if not is_main_process():
        return
    features.to_table().print()
    causal = features.provenance.get("causal_check")
    if causal is not None:
        Table(**causal).print()
    _save(features, output, options, {"causal_check": causal})
    for written in output.glob(f"{CHECKPOINT}*"):
        written.unlink()


def find_repetition(options: argparse.Namespace) -> None:
    """Find the features of endless repetition, try them by steering, and write them, loops, curves and `summary.json`.

    Runs in one process, not under a launcher: it samples completions in turn.
    """
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
            window_lengths=options.window_lengths or (), sampling=sampling, **chosen(options, *names), **bounds
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
    Table(**features.provenance["ranking"]).print()
    print_steering(features)
    figures = {output / f"steering_curve_layer{layer}.svg": svg for layer, svg in curve_figures(features).items()}
    for path, svg in figures.items():
        write_text(path, svg)
    results = {
        "table": repetition_table(features),
        "ranking": features.provenance["ranking"],
        "loops": {"file": loops_path, **features.provenance["loops"]},
        "steering": features.settings.get("steering"),
        "steering_curve": features.provenance.get(CURVE_KEY),
        "figures": list(figures),
    }
    _save(features, output, options, results)


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
        **chosen(options, "top", "by", "common_tokens", "k", "max_length"),
    )
    features.to_table().print()
    _save(features, output, options, {})


def rank(options: argparse.Namespace) -> None:
    """Rank features by their activation on one response, print them, and write them and `summary.json`."""
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
        **chosen(options, "max_reference_rate", "by", "top", "k", "max_length"),
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
    table.print(markdown=options.markdown)
    if options.markdown:
        return
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
    origins += [(f"found with {key}", value) for key, value in features.settings.items() if not isinstance(value, dict)]
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


def _kept(output: Path, resumable: bool) -> str:
    if not resumable:
        if isinstance(sys.exception(), UserError):  # a mistake, found before the pass
            return ""
        return "Nothing is kept of this pass; with --resumable the same command goes on where it was stopped."
    written = sorted(output.glob(f"{CHECKPOINT}*"))
    return f"The sums so far are in '{written[0]}': the same command goes on from there." if written else ""


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


def _given_loops(options: argparse.Namespace, bounds: dict[str, int]) -> LoopCollection:
    """The loops among the completions of --loops, before a model is loaded."""
    from qscope_posttrain.features.find.loops import loops_from_texts

    rows = [row for _, row in read_jsonl(options.loops)]
    tokenizer = load_tokenizer(options.model, options.revision)
    try:
        return loops_from_texts(tokenizer, rows, **bounds)
    except UserError as error:
        raise UserValueError(f"{options.loops}: {error}") from error
