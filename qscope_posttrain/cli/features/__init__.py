"""`qscope features find`, `find-repetition`, `contrast`, `rank`, `explain`, `tokens` and `show`."""

from __future__ import annotations

from qscope_posttrain.cli.features import explain, find
from qscope_posttrain.cli.options import add_endpoint_options
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.parsing.table import MODEL, SAES, add_options


def build_parser() -> CommandParser:
    """The parser of `qscope features`."""
    parser = CommandParser(prog="qscope features")
    parser.command(find.find, SAES, find.FIND)
    parser.command(find.find_repetition, SAES, find.FIND_REPETITION)
    parser.command(find.contrast, SAES, find.TEXTS, find.CONTRAST)
    new = parser.command(find.rank, SAES, find.TEXTS, find.RANK)
    add_options(new.add_mutually_exclusive_group(required=True), find.RESPONSE)
    add_options(new.add_mutually_exclusive_group(), find.PROMPT)
    add_endpoint_options(parser.command(explain.explain, MODEL, "--sae --k", explain.EXPLAIN))
    parser.command(explain.tokens, MODEL, explain.TOKENS)
    parser.command(find.show, find.SHOW)
    return parser
