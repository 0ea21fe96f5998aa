"""`qscope steer`: the same prompts and seed with and without steering, or (`--curve`) at several strengths."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.options import chat_settings, check_only_with, chosen, load, sampling_settings
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.parsing.table import MODEL, SAMPLING, TEXT_LIST, add_options
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_rows, write_summary
from qscope_posttrain.report.tables import Table
from qscope_posttrain.text.inputs import read_prompts, read_text_list

if TYPE_CHECKING:
    from torch import Tensor

    from qscope_posttrain.evaluation.dose_curve import DoseCurve, Effect
    from qscope_posttrain.features.feature_set import FeatureSet
    from qscope_posttrain.models.steering import Positions, Steering

RESPONSES = "responses.jsonl"
PROMPT = """
--prompt: text+  # one or several texts
--prompts optional
"""
STEERING = """
--layer: int  # layer to steer; by default the one chosen with the features
--label: text  # language or class whose features are used, if there are several
--feature: int+  # only the features with these ids
--strength: float  # by default the one chosen with the features; negative ones suppress
--unit: raw|norm|relative  # unit of strength; relative is in median lengths of hidden states
--mode: add|project_out|ablate|clamp = add  # kind of change; ablate and clamp need one feature
--positions: all|prompt|generated = generated  # tokens that are steered
--window-start: int  # first generated token that is steered, from 0
--window-length: int  # number of generated tokens that are steered; by default to the end
"""
CURVE = f"""
--curve: float+  # strengths to compare; negative ones suppress
--effect-language: text  # effect to measure: the response contains this language's script
--effect-pattern: text  # effect to measure: the response matches this regular expression
--suppress: switch  # the best strength is the one with the smallest effect
--max-perplexity-ratio: float = 1.1  # largest acceptable perplexity ratio (steered / unsteered)
--plain-prompt: text  # instruction that asks for the effect, measured without steering
--other-texts: text  # texts whose perplexity under steering is measured too: {TEXT_LIST}
--max-other-texts: int = 200  # maximum number of --other-texts to use
--random-directions: int = 3  # number of control directions, pooled
--sae optional  # draw the controls from features of this SAE instead of random directions
--k
"""


def steer(options: argparse.Namespace) -> None:
    """Generate twice or measure a curve, print the table, and write the results where asked."""
    from qscope_posttrain.features.feature_set import FeatureSet

    if options.output is not None:
        if options.curve is not None:
            require_extra("report")
        writable_folder(options.output)
    prompts = {"all": options.prompt} if options.prompt else read_prompts(options.prompts, language="all")
    positions = _positions(options)
    features = FeatureSet.load(options.features)
    if options.feature is not None:
        features = features.select(feature_ids=options.feature)
    if options.curve is None:
        check_only_with(options, CURVE, ": only a dose curve uses it; give its strengths with --curve.")
        _compare(options, features, prompts, positions)
    elif options.strength is not None:
        raise UserValueError("--curve has its own strengths; leave --strength out.")
    else:
        _measure_curve(options, features, [prompt for group in prompts.values() for prompt in group], positions)


def _compare(options: argparse.Namespace, features: FeatureSet, prompts: dict[str, Any], positions: Positions) -> None:
    """Generate with and without steering, side by side."""
    from qscope_posttrain.features.steering import feature_steering
    from qscope_posttrain.models import steering as hooks
    from qscope_posttrain.models.generation import generate_samples
    from qscope_posttrain.text.repetition import is_endless_repetition

    settings, chat = sampling_settings(options), chat_settings(options)
    where = chosen(options, "layer", "strength", "unit", "mode", "label")
    steering = feature_steering(features, positions=positions, **where)
    model, tokenizer = load(options)
    features.check_model(model)
    status("without steering")
    without = generate_samples(model, tokenizer, prompts, settings, **chat)
    status(f"with steering: {_in_words(steering)}")
    # Where every response ends with its first token there is nothing to steer, and the table shows it.
    with hooks.steer(model, steering, require_generated=False):
        steered = generate_samples(model, tokenizer, prompts, settings, **chat)
    pairs = list(zip(without, steered, strict=True))
    loops = [[is_endless_repetition(s.tokens, ended=s.ended) for s in samples] for samples in (without, steered)]
    counts = [f"{sum(found)} of {len(pairs)}" for found in loops]
    table = Table(
        title=f"Steering: {_in_words(steering)}",
        columns=["prompt", "without", "with"],
        rows=[(before.prompt, before.response, after.response) for before, after in pairs],
        caption=f"Endless repetition: {counts[0]} without, {counts[1]} with.",
    )
    table.print()
    if options.output is not None:
        responses = []
        for number, pair in enumerate(pairs):
            responses.append({"language": pair[0].language, "prompt": pair[0].prompt, "sample": pair[0].sample_index})
            for side, sample, found in zip(("without", "with"), pair, loops, strict=True):
                shown = {"response": sample.response, "token_ids": sample.tokens, "ended": sample.ended}
                responses[-1][side] = {**shown, "endless_repetition": found[number]}
        results = {"steering": _summary(steering), "table": table, "responses": responses}
        status(f"written to {write_summary(options.output, 'steer', vars(options), results)}")


def _measure_curve(options: argparse.Namespace, features: FeatureSet, prompts: list[Any], positions: Positions) -> None:
    """Measure effect and perplexity at several strengths, next to controls."""
    from qscope_posttrain.evaluation.dose_curve import FEATURE, dose_curve, matches, writes_language

    if (options.effect_language is None) == (options.effect_pattern is None):
        raise UserValueError("--curve needs one thing to measure: --effect-language zh, or --effect-pattern 'REGEX'.")
    by_pattern = options.effect_language is None
    effect = matches(options.effect_pattern) if by_pattern else writes_language(options.effect_language)
    settings, chat = sampling_settings(options), chat_settings(options)
    texts = [] if options.other_texts is None else read_text_list(options.other_texts, options.max_other_texts)
    model, tokenizer = load(options)
    features.check_model(model)
    curve = dose_curve(
        model,
        tokenizer,
        prompts,
        features,
        effect,
        options.curve,
        settings=settings,
        random_vectors=_random_rows(options, features),
        random_count=options.random_directions,
        texts=texts,
        positions=positions,
        **chosen(options, "label", "plain_prompt", "seed", "layer", "unit", "mode"),
        **chat,
    )
    table = curve.to_table()
    table.print()
    best = curve.best(options.max_perplexity_ratio, -1 if options.suppress else 1)
    verdict = _verdict(curve, best, options)
    status(verdict, enabled=True)
    if options.output is not None:
        found = None if best is None else {"strength": best.strength, "effect": best.effect, "kind": FEATURE}
        responses = write_rows(Path(options.output) / RESPONSES, _response_rows(curve, effect))
        results = {"table": table, "best": found, "verdict": verdict, "responses": responses}
        write_summary(options.output, "steer", vars(options), results)
        status(f"written to {_write_report(Path(options.output), curve, verdict)}")


def build_parser() -> CommandParser:
    """The parser of `qscope steer`."""
    says = "Generate with and without steering, side by side."
    parser = CommandParser(call=steer, prog="qscope steer", description=says)
    add_options(parser, MODEL, "--features")
    add_options(parser.add_mutually_exclusive_group(required=True), PROMPT)
    add_options(parser, STEERING, SAMPLING, "--samples = 1", "--max-new-tokens = 128", "--output optional")
    add_options(parser.add_argument_group("dose curve"), CURVE)
    return parser


def _positions(options: argparse.Namespace) -> Positions:
    """The tokens to steer, from three options. ValueError for a window of other than generated tokens, or one that no
    response reaches."""
    from qscope_posttrain.models.steering import Window

    windowed = options.window_start is not None or options.window_length is not None
    if windowed and options.positions != "generated":
        raise UserValueError(
            f"--window-start and --window-length count generated tokens, not --positions {options.positions}."
        )
    first = options.window_start or 0
    if options.positions == "generated" and first + 2 > options.max_new_tokens:
        raise UserValueError(
            f"with --max-new-tokens {options.max_new_tokens} generated token {first} is never read, so that nothing "
            f"would be steered; give at least {first + 2}."
        )
    positions: Positions = Window(first, options.window_length) if windowed else options.positions
    return positions


def _summary(steering: Steering) -> dict[str, Any]:
    found = {name: getattr(steering, name) for name in ("mode", "layers", "strength", "unit", "positions")}
    if isinstance(steering.positions, str):
        return {**found, "window": None}
    return {**found, "positions": "window", "window": asdict(steering.positions)}


def _in_words(steering: Steering) -> str:
    places = {"all": "all tokens", "prompt": "tokens of the prompt", "generated": "generated tokens"}
    if isinstance(steering.positions, str):
        place = places[steering.positions]
    else:
        start, length = steering.positions.start, steering.positions.length
        place = "generated tokens " + (f"from {start}" if length is None else f"{start} to {start + length - 1}")
    strength = f"strength {steering.strength:g} ({steering.unit})"
    return f"{steering.mode}, {strength}, layer {steering.layers[0]}, {place}"


def _random_rows(options: argparse.Namespace, features: FeatureSet) -> Tensor | None:
    """Directions of random features of the SAE in the steered layer, or None without --sae."""
    import torch

    from qscope_posttrain.features.steering import SETTINGS_KEY
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

    if options.sae is None:
        return None
    layer = options.layer if options.layer is not None else features.settings.get(SETTINGS_KEY, {}).get("layer")
    if layer is None:
        raise UserValueError("--sae needs --layer, since the features name none.")
    sae = SparseAutoencoder.load(options.sae, layer=layer, k=options.k, checksum=False)
    drawn = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(options.seed))
    return sae.select(drawn[: options.random_directions]).decoder.float()


def _response_rows(curve: DoseCurve, effect: Effect) -> Iterator[dict[str, Any]]:
    for point in curve.points:
        for sample in point.responses:
            about = {"kind": point.kind, "strength": point.strength, "prompt": sample.prompt_index}
            yield {**about, "response": sample.response, "effect": effect(sample), "ended": sample.ended}


def _verdict(curve: DoseCurve, best: Any, options: argparse.Namespace) -> str:
    ratio = options.max_perplexity_ratio
    if best is None:
        return f"No strength keeps the perplexity of the responses within {ratio:g} times that without steering."
    before, after = curve.unsteered.effect, best.effect
    apart = after.high < before.low or after.low > before.high
    return (
        f"Strength {best.strength:g}: effect {after.estimate:.3f} ({after.low:.3f} .. {after.high:.3f}) against "
        f"{before.estimate:.3f} ({before.low:.3f} .. {before.high:.3f}) without steering; the intervals "
        f"{'are apart' if apart else 'overlap'}. It is the best of {len(options.curve)} strengths whose perplexity "
        f"stays within {ratio:g} times that without steering: sample anew to quote it."
    )


def _write_report(output: Path, curve: DoseCurve, verdict: str) -> Path:
    from qscope_posttrain.features.dose_curve import FEATURE, MEANS, RANDOM
    from qscope_posttrain.report.html import Figure, Section, write_html
    from qscope_posttrain.report.plots import Curve, line_curves
    from qscope_posttrain.report.summary import write_text

    def figure(name: str, label: str, log: bool) -> str:
        curves = []
        for kind in (FEATURE, MEANS, RANDOM):
            if any(point.kind == kind for point in curve.points):
                points = curve.of(kind)
                estimate, low, high = zip(*(getattr(point, name) for point in points), strict=True)
                curves.append(Curve(kind, [point.strength for point in points], estimate, low, high))
        return line_curves(curves, "strength", label, log_y=log, percent=not log)

    effect = figure("effect", "share of responses with the effect", False)
    perplexity = figure("perplexity", "perplexity under the unsteered model", True)
    write_text(output / "curve.svg", effect)
    figures = (Figure(effect, "The effect, with intervals over prompts."), Figure(perplexity, "Its cost."))
    section = Section("Dose curve", verdict, tables=(curve.to_table(),), figures=figures)
    return write_html(output / "report.html", "Steering: effect and cost", [section])
