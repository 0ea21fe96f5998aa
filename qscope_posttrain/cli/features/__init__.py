"""`qscope features find`, `find-repetition`, `contrast`, `rank`, `explain`, `tokens` and `show`."""

from __future__ import annotations

from qscope_posttrain.cli.features import explain, find
from qscope_posttrain.cli.options import add_endpoint_options
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.parsing.table import MODEL, SAES, add_options


def build_parser() -> CommandParser:
    """The parser of `qscope features`."""
    parser = CommandParser(prog="qscope features")
    parser.command(
        "find",
        find.find,
        "find the features of each language in one pass over texts",
        *(SAES, find.FIND),
        description="One pass over texts, which a launcher (accelerate launch, torchrun) may share among processes.",
    )
    parser.command(
        "find-repetition",
        find.find_repetition,
        "find the features of endless repetition, and try them",
        *(SAES, find.FIND_REPETITION),
        description="Runs in one process, not under a launcher: it samples completions in turn.",
    )
    says = "find the features that distinguish two sets of texts"
    parser.command("contrast", find.contrast, says, SAES, find.TEXTS, find.CONTRAST)
    says = "rank features by their activation on one response"
    new = parser.command("rank", find.rank, says, SAES, find.TEXTS, find.RANK)
    add_options(new.add_mutually_exclusive_group(required=True), find.RESPONSE)
    add_options(new.add_mutually_exclusive_group(), find.PROMPT)
    says = "let a chat model explain features, and test what it says"
    add_endpoint_options(parser.command("explain", explain.explain, says, MODEL, "--sae --k", explain.EXPLAIN))
    says = "show token by token where features fire in texts"
    parser.command("tokens", explain.tokens, says, MODEL, explain.TOKENS)
    parser.command("show", find.show, "print a FeatureSet", find.SHOW)
    return parser
