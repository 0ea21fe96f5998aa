"""Options declared as text, one entry each, in the form of an annotated assignment:

    --top-p: float = 1.0  # nucleus sampling: probability mass to draw from; 1 keeps all
    --layers: text+ required  # layer numbers from 0, ranges such as 20-27, or all
    --seed

The type is text, int, float, switch (a flag), yes|no (a flag with an opposite) or a choice of words such as or|votes.
After it, `+` takes one or more values, `*` any number, `{2}` that many. A long help text goes on in indented lines.
An entry without a type changes the option of that name above it, or the shared one: its default, its help, or whether
it is `required` or `optional`. Nothing but names, also several on a line, are shared options as they are.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

PROMPTS = "JSONL with prompt (text or chat messages) and, if known, language; or a folder of <language>.txt"
TEXT_LIST = "a text file with one text per line, or JSONL with text"
SHARED_TABLE = f"""
--model: text required  # folder or hub id of the model
--revision: text  # branch, tag or commit of the model on the hub
--dtype: auto|float32|bfloat16|float16 = auto  # dtype of the model; auto is float32 on a CPU
--device: text  # device such as cuda:0 or cpu; by default the first GPU if there is one
--sae: text required  # folder of layer files, file of one layer, catalog name or hub id of an SAE
--layers: text+ required  # layer numbers from 0, ranges such as 20-27, or all
--k: int  # k of a TopK SAE, if neither its file nor its release name says it
--saes-at-once: int  # number of SAEs in memory at a time; each group of them takes one pass
--features: text required  # features.safetensors, or the folder that holds it
--texts: text required  # folder of <language>.txt with one text per line, or JSONL with text and language
--prompts: text required  # {PROMPTS}
--max-texts: int  # maximum number of texts per language, file or set, the first ones
--max-prompts: int  # maximum number of prompts per language, the first ones
--max-length: int = 512  # truncate each text to this many tokens
--tokens-per-batch: int = 4096  # tokens in one forward pass
--samples: int = 8  # responses per prompt
--temperature: float = 1.0  # sampling temperature; 0 is greedy, and rates depend on it
--top-p: float = 1.0  # nucleus sampling: probability mass to draw from; 1 keeps all
--max-new-tokens: int = 256  # maximum length of a response, in tokens
--batch-size: int = 32  # responses generated at a time
--chat: switch  # send texts through the chat template, as a user's message
--chat-template-options: text  # JSON with arguments of the chat template, such as {{"enable_thinking": false}}
--seed: int = 0  # seed of everything that is drawn at random
--output: text required  # folder for summary.json and the other results; made if missing
--markdown: switch  # print Markdown tables
--language: text  # show only features of this language
--layer: int+  # show only features of these layers
--top: int  # show only the N best features per language and layer
--min-copies: int = 4  # minimum number of whole copies at the end that make a loop
--min-tokens: int = 12  # minimum number of tokens that these copies have together
--input-scale: float  # factor on the activations that a SAELens file may lack
"""
MODEL = "--model --revision --dtype --device"
SAES = f"{MODEL} --sae --layers --k"
SAMPLING = "--samples --temperature --top-p --max-new-tokens --batch-size --chat --chat-template-options --seed"
"""Shared options that go together"""

_HEAD = re.compile(r"(?P<name>[\w-]+)(?:: (?P<kind>\S+))?(?: (?P<need>required|optional))?(?: = (?P<default>.*))?")
_KIND = re.compile(r"(?P<type>[\w|-]+)(?P<count>\+|\*|\{\d+\})?")
_TYPES: dict[str, dict[str, Any]] = {
    "text": {},
    "int": {"type": int},
    "float": {"type": float},
    "switch": {"action": "store_true"},
    "yes|no": {"action": argparse.BooleanOptionalAction},
}


def add_options(parser: argparse._ActionsContainer, *tables: str) -> None:
    """Add the options of these tables, in their order."""
    for name, settings in read_tables(*tables).items():
        parser.add_argument(name, **settings)


def defaults_of(table: str) -> dict[str, Any]:
    """{destination: default} of the options of a table."""
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, table)
    return vars(parser.parse_args([]))


def read_tables(*tables: str, shared: Mapping[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """{option: arguments of `add_argument`}; `shared` is by default SHARED_TABLE."""
    shared = _SHARED if shared is None else shared
    found: dict[str, dict[str, Any]] = {}
    for entry in re.split(r"\n(?! )", "\n".join(tables).strip()):
        head, _, help_text = " ".join(entry.split()).partition(" # ")
        names = head.split()
        if not help_text and all(name in shared for name in names):  # nothing but names
            found |= {name: shared[name] for name in names}
            continue
        match = _HEAD.fullmatch(head)
        known = {} if match is None else found.get(match["name"], shared.get(match["name"], {}))
        if match is None or not (match["kind"] or known):
            raise SyntaxError(f"an option reads 'NAME: TYPE = DEFAULT  # HELP', or is a shared one; got {entry!r}")
        name, kind, need, default = match.group("name", "kind", "need", "default")
        settings = dict(known) if kind is None else {"help": known.get("help"), **_kind(kind)}
        settings |= {"help": help_text.replace("%", "%%")} if help_text else {}
        settings |= {} if need is None else {"required": need == "required"}
        if default is not None:
            settings["default"] = _default(default, settings)
        found[name] = settings
    return found


def _kind(kind: str) -> dict[str, Any]:
    match = _KIND.fullmatch(kind)
    if match is None:
        raise SyntaxError(f"no type of an option: {kind!r}")
    settings = _TYPES.get(match["type"])
    settings = {"choices": tuple(match["type"].split("|"))} if settings is None else dict(settings)
    count = match["count"]
    return settings if count is None else {**settings, "nargs": int(count[1:-1]) if count.startswith("{") else count}


def _default(text: str, settings: Mapping[str, Any]) -> Any:
    if "action" in settings:
        return text == "yes"
    convert = settings.get("type", str)
    return [convert(word) for word in text.split()] if "nargs" in settings else convert(text)


_SHARED = read_tables(SHARED_TABLE, shared={})
