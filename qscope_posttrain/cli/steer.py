"""`qscope steer`: the same prompts and seed with and without steering, or (`--curve`) at several strengths."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.inputs import load_model, read_prompts, sampling_settings, template_options
from qscope_posttrain.cli.options import OptionParser, add_model_options
from qscope_posttrain.cli.steer_curve import add_curve_options, check_curve_options, run_curve
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.report.tables import Table

if TYPE_CHECKING:
    from qscope_posttrain.models.generation import Sample
    from qscope_posttrain.models.steering import Positions, Steering

MODES = ("add", "project_out", "ablate", "clamp")
UNITS = ("raw", "norm", "relative")
POSITIONS = ("all", "prompt", "generated")


def run(arguments: Sequence[str]) -> int:
    """Generate twice, print the table, write `summary.json` where asked, and return the exit status."""
    from qscope_posttrain.features.feature_set import FeatureSet
    from qscope_posttrain.features.steering import feature_steering
    from qscope_posttrain.models.generation import generate_samples
    from qscope_posttrain.models.steering import steer

    options = _parser().parse(arguments)
    if options.curve is not None and options.output is not None:
        require_extra("report")
    output = None if options.output is None else writable_folder(options.output)
    prompts = {"all": options.prompt} if options.prompt else read_prompts(options.prompts, language="all")
    chat_options = template_options(options.chat_template_options)
    settings = sampling_settings(options)
    positions = _positions(options)
    features = FeatureSet.load(options.features)
    if options.feature is not None:
        features = features.select(feature_ids=options.feature)
    if options.curve is None:
        check_curve_options(options)
    else:
        if options.strength is not None:
            raise UserValueError("--curve has its own strengths; leave --strength out.")
        run_curve(options, features, settings, positions)
        return 0
    steering = feature_steering(
        features,
        layer=options.layer,
        strength=options.strength,
        unit=options.unit,
        positions=positions,
        mode=options.mode,
        label=options.label,
    )
    model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
    features.check_model(model)

    def generate() -> list[Sample]:
        return generate_samples(
            model, tokenizer, prompts, settings, chat=options.chat, chat_template_options=chat_options
        )

    status("without steering")
    without = generate()
    status(f"with steering: {_in_words(steering)}")
    # Where every response ends with its first token there is nothing to steer, and the table shows it.
    with steer(model, steering, require_generated=False):
        steered = generate()
    table = _table(without, steered, steering)
    table.print()
    if output is not None:
        results = {"steering": _summary(steering), "table": table, "responses": _pairs(without, steered)}
        status(f"written to {write_summary(output, 'steer', vars(options), results)}")
    return 0


def _positions(options: argparse.Namespace) -> Positions:
    """Which tokens, from three options.

    Raises:
        ValueError: a window of other than generated tokens, or one that no response reaches.
    """
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
    if windowed:
        return Window(first, options.window_length)
    positions: Positions = options.positions
    return positions


def _table(without: Sequence[Sample], steered: Sequence[Sample], steering: Steering) -> Table:
    rows = [(before.prompt, before.response, after.response) for before, after in zip(without, steered, strict=True)]
    loops = [sum(map(_is_loop, samples)) for samples in (without, steered)]
    return Table(
        title=f"Steering: {_in_words(steering)}",
        columns=["prompt", "without", "with"],
        rows=rows,
        caption=f"Endless repetition: {loops[0]} of {len(rows)} without, {loops[1]} of {len(rows)} with.",
    )


def _pairs(without: Sequence[Sample], steered: Sequence[Sample]) -> list[dict[str, Any]]:
    """What each row of the table says and a little more, for scripts."""

    def side(sample: Sample) -> dict[str, Any]:
        return {
            "response": sample.response,
            "token_ids": sample.tokens,
            "ended": sample.ended,
            "endless_repetition": _is_loop(sample),
        }

    return [
        {
            "language": before.language,
            "prompt": before.prompt,
            "sample": before.sample_index,
            "without": side(before),
            "with": side(after),
        }
        for before, after in zip(without, steered, strict=True)
    ]


def _is_loop(sample: Sample) -> bool:
    from qscope_posttrain.text.repetition import is_endless_repetition

    return is_endless_repetition(sample.tokens, ended=sample.ended)


def _summary(steering: Steering) -> dict[str, Any]:
    positions = steering.positions
    window = None if isinstance(positions, str) else {"start": positions.start, "length": positions.length}
    return {
        "mode": steering.mode,
        "layers": steering.layers,
        "strength": steering.strength,
        "unit": steering.unit,
        "positions": "window" if window else positions,
        "window": window,
    }


def _in_words(steering: Steering) -> str:
    what = _summary(steering)
    places = {"all": "all tokens", "prompt": "tokens of the prompt", "generated": "generated tokens"}
    place = places.get(what["positions"], "generated tokens")
    if what["window"]:
        start, length = what["window"]["start"], what["window"]["length"]
        place += f" from {start}" if length is None else f" {start} to {start + length - 1}"
    return f"{what['mode']}, strength {what['strength']:g} ({what['unit']}), layer {steering.layers[0]}, {place}"


def _parser() -> OptionParser:
    parser = OptionParser(prog="qscope steer", description="Generate with and without steering, side by side.")
    add_model_options(parser)
    parser.add_argument("--features", required=True, help="features.safetensors, or the folder that holds it")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", help="one or several texts")
    source.add_argument("--prompts", help="JSONL with prompt and, if known, language, or folder of <language>.txt")
    parser.add_argument("--layer", type=int, help="by default the one chosen with the features")
    parser.add_argument("--label", help="the language or class whose features are meant, where there are several")
    parser.add_argument("--feature", type=int, nargs="+", help="only the features of these ids")
    parser.add_argument("--strength", type=float, help="by default the one chosen with the features; may be negative")
    parser.add_argument("--unit", choices=UNITS, help="of strength; relative is in median lengths of hidden states")
    parser.add_argument("--mode", choices=MODES, default="add", help="ablate and clamp need a single feature")
    parser.add_argument("--positions", choices=POSITIONS, default="generated", help="tokens that are steered")
    parser.add_argument("--window-start", type=int, help="first generated token that is steered, from 0")
    parser.add_argument("--window-length", type=int, help="generated tokens that are steered; by default to the end")
    parser.add_argument("--samples", type=int, default=1, help="responses to each prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus; 1 keeps all tokens")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest response")
    parser.add_argument("--batch-size", type=int, default=32, help="responses generated at a time")
    parser.add_argument("--chat", action="store_true", help="send texts through the chat template, as a user's message")
    parser.add_argument("--chat-template-options", help='JSON for the template, for example {"enable_thinking": false}')
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, the same on both sides")
    parser.add_argument("--output", help="folder for summary.json, and of a curve report.html")
    add_curve_options(parser)
    return parser
