"""`qscope features find`, `find-repetition`, `contrast`, `rank`, `explain`, `tokens` and `show`."""

from __future__ import annotations

from collections.abc import Sequence

from qscope_posttrain.cli.features import explain, find, repetition
from qscope_posttrain.cli.options import add_shared
from qscope_posttrain.cli.parsing.parser import CommandParser


def run(arguments: Sequence[str]) -> int:
    """Run the sub-command and return the exit status."""
    return build_parser().run(arguments)


def build_parser() -> CommandParser:
    """The parser of `qscope features`."""
    parser = CommandParser(prog="qscope features")
    new = parser.command(
        "find",
        find.find,
        "find the features of each language in one pass over texts",
        description="One pass over texts, which a launcher (accelerate launch, torchrun) may share among processes.",
    )
    find.add_find_options(new)
    new = parser.command(
        "find-repetition",
        repetition.find_repetition,
        "find the features of endless repetition, and try them",
        description="Runs in one process, not under a launcher: it samples completions in turn.",
    )
    repetition.add_options(new)
    new = parser.command("contrast", find.contrast, "find the features that distinguish two sets of texts")
    find.add_contrast_options(new)
    find.add_rank_options(parser.command("rank", find.rank, "rank features by their activation on one response"))
    new = parser.command("explain", explain.explain, "let a chat model explain features, and test what it says")
    explain.add_explain_options(new)
    new = parser.command("tokens", explain.tokens, "show token by token where features fire in texts")
    explain.add_tokens_options(new)
    new = parser.command("show", find.show, "print a FeatureSet")
    new.add_argument("path", help="features.safetensors, or the folder that holds it")
    add_shared(new, "language", "layer", "top", "markdown")
    return parser
