"""One study of one model as a program, so that it runs in a process of its own: `python -m benchmarks.real.study`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real import habits, hate_speech
from qscope_posttrain.models.generation import SamplingSettings
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.report.summary import to_json, write_text


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    result = STUDIES[options.study](options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.output, json.dumps(to_json(result), indent=1, ensure_ascii=False) + "\n")
    return 0


def _switching(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(str(options.model), dtype="float32", device="cpu")
    settings = SamplingSettings(2, options.temperature, top_p=1.0, max_new_tokens=64, batch_size=40)
    return habits.switching(
        model, tokenizer, settings, 8 if options.quick else 24, habits.SOURCES[: 2 if options.quick else None]
    )


def _loops(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(str(options.model), dtype="float32", device="cpu")
    settings = SamplingSettings(1, top_p=1.0, max_new_tokens=128 if options.quick else 512, batch_size=32)
    return habits.loops(
        model, tokenizer, settings, 8 if options.quick else 32, (0.0,) if options.quick else (0.0, 0.3, 0.7, 1.0)
    )


def _hate_speech(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        return hate_speech.study(options.model, options.saes, options.layers, ("en", "fr"), seeds=1, draws=0)
    return hate_speech.study(options.model, options.saes, options.layers)


STUDIES = {"switching": _switching, "loops": _loops, "hate_speech": _hate_speech}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--saes", type=Path)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--quick", action="store_true", help="fewer texts, to see that it runs")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
