"""`qscope sae list | show | check | convert | train`: which SAEs there are, what one is, whether it fits, new ones."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from qscope_posttrain.cli import sae_check, sae_convert
from qscope_posttrain.cli.options import OptionParser
from qscope_posttrain.cli.recipe_keys import split_arguments
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae import catalog
from qscope_posttrain.sae.catalog import CatalogEntry
from qscope_posttrain.sae.download import in_words


def run(arguments: Sequence[str]) -> int:
    """Run the sub-command and return the exit status."""
    if split_arguments(arguments)[0][:1] == ["train"]:
        rest = list(arguments)
        rest.remove("train")
        status: int = importlib.import_module("qscope_posttrain.cli.sae_train").run(rest)
        return status
    options = _parser().parse(arguments)
    if options.action == "check":
        return sae_check.check(options)
    if options.action == "convert":
        sae_convert.convert(options)
    elif options.action == "show":
        show(options)
    else:
        _print(_listing(options.model), options.markdown)
    return 0


def show(options: argparse.Namespace) -> None:
    """Print what a release of the catalogue is, or what a file or folder on this machine holds, without a download."""
    if Path(options.source).expanduser().exists():
        from qscope_posttrain.cli.sae_local import tables

        for table in tables(Path(options.source).expanduser(), options.layer, options.k):
            _print(table, options.markdown)
        return
    entry = catalog.find(options.source)
    if entry is None:
        close = catalog.suggestions(options.source)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserValueError(
            f"'{options.source}' is neither on this machine nor in the catalogue (`qscope sae list`).{hint} "
            "Other repositories of the hub are read by `qscope sae check` and `qscope sae convert`."
        )
    _print(_entry_table(entry), options.markdown)
    if options.layer is not None:
        _print(_layer_table(entry, options.layer), options.markdown)


def _listing(model: str | None) -> Table:
    entries = catalog.entries() if model is None else catalog.for_model(model)
    if not entries:
        known = sorted({entry.backbone for entry in catalog.entries()})
        raise UserValueError(f"no SAE for a model named '{model}'; there are some for {', '.join(known)}.")
    rows: list[list[str | int]] = [
        [
            entry.name,
            entry.backbone,
            _layers(entry),
            entry.d_model,
            entry.d_sae,
            _sparsity(entry),
            in_words(entry.layer_bytes),
        ]
        for entry in entries
    ]
    return Table(
        f"{len(rows)} releases of SAEs on the residual stream",
        ["name", "model", "layers", "d_model", "latents", "L0", "a layer"],
        rows,
        "`qscope sae show NAME` says where each lies, its licence, and how that was verified.",
    )


def _entry_table(entry: CatalogEntry) -> Table:
    rows = [
        ["release", f"{entry.family}: {entry.name}"],
        ["repository", entry.repository],
        ["model", f"{entry.backbone} ({entry.tuning}), {entry.model_layers} layers of width {entry.d_model}"],
        ["class in transformers", f"{entry.model_class} (model_type {entry.model_type})"],
        ["latents", f"{entry.d_sae} ({entry.d_sae / entry.d_model:.3g} a dimension)"],
        ["firing a token", _sparsity(entry)],
        ["layers", _layers(entry)],
        ["site", f"{entry.site}: the output of these decoder layers, counted from 0"],
        ["files", ", ".join((entry.file, *entry.companions))],
        ["size", f"{in_words(entry.layer_bytes)} a layer, uncompressed"],
        ["format", entry.format],
        ["licence", entry.license],
        ["facts from", entry.verified_by],
    ]
    return Table(entry.name, ["what", "it is"], rows)


def _layer_table(entry: CatalogEntry, layer: int) -> Table:
    taken = entry.l0_of(layer)
    rows = [["files", ", ".join(entry.files_of(layer))]]
    if taken is not None:
        rows.append(["L0s to choose from", ", ".join(entry.choices[layer])])
        rows.append(["this one as a name", f"{entry.name}-l0-{taken}"])
    expected = entry.expected_l0(layer)
    rows.append(["latents firing a token", "not stated" if expected is None else f"{expected:.3g}"])
    return Table(f"Layer {layer}", ["what", "it is"], rows)


def _layers(entry: CatalogEntry) -> str:
    if len(entry.layers) == entry.model_layers:
        return f"all {entry.model_layers}"
    return ", ".join(map(str, entry.layers))


def _sparsity(entry: CatalogEntry) -> str:
    if entry.k is not None:
        return str(entry.k)
    labels = [label for offered in entry.choices.values() for label in offered]
    if not labels:
        return "not stated" if entry.mean_l0 is None else f"{entry.mean_l0:g} on average"
    if not all(label.isdecimal() for label in labels):
        return ", ".join(dict.fromkeys(labels))
    return f"{min(map(int, labels))} to {max(map(int, labels))}"


def _print(table: Table, markdown: bool) -> None:
    if markdown:
        print(table.to_markdown())
    else:
        table.print()


def _parser() -> OptionParser:
    parser = OptionParser(prog="qscope sae")
    actions = parser.add_subparsers(dest="action", required=True)
    every = actions.add_parser("list", help="the published SAEs that can be used by name")
    every.add_argument("--model", help="only those for this model: hub id, or a part of it such as qwen3-8b")
    one = actions.add_parser("show", help="what a release is, or what a file or folder holds; downloads nothing")
    one.add_argument("source", help="name or hub id in the catalogue, file or folder")
    one.add_argument("--layer", type=int, help="layer number from 0")
    one.add_argument("--k", type=int, help="k of TopK, where neither file nor folder name says it")
    for action in (every, one):
        action.add_argument("--markdown", action="store_true", help="as Markdown tables")
    sae_check.add_options(actions.add_parser("check", help="load an SAE, and measure on text whether it fits a model"))
    sae_convert.add_options(actions.add_parser("convert", help="write an SAE in another format"))
    actions.add_parser("train", help="train SAEs for several layers of a model in one stream", add_help=False)
    return parser
