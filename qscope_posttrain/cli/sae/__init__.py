"""`qscope sae list`, `show`, `check`, `convert` and `train`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from qscope_posttrain.cli.options import add_shared
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.parsing.recipes import split_arguments
from qscope_posttrain.cli.sae import check, convert
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae import catalog
from qscope_posttrain.sae.catalog import CatalogEntry
from qscope_posttrain.sae.download import in_words
from qscope_posttrain.sae.layout import layer_in_path, weights_in


def run(arguments: Sequence[str]) -> int:
    """Run the sub-command and return the exit status."""
    if split_arguments(arguments)[0][:1] == ["train"]:
        rest = list(arguments)
        rest.remove("train")
        status: int = importlib.import_module("qscope_posttrain.cli.sae.train").run(rest)
        return status
    return build_parser().run(arguments)


def list_releases(options: argparse.Namespace) -> None:
    """Print the published SAEs of the catalogue, of all models or one."""
    entries = catalog.entries() if options.model is None else catalog.for_model(options.model)
    if not entries:
        known = sorted({entry.backbone for entry in catalog.entries()})
        raise UserValueError(f"no SAE for a model named '{options.model}'; there are some for {', '.join(known)}.")
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
    columns = ["name", "model", "layers", "d_model", "latents", "L0", "a layer"]
    caption = "`qscope sae show NAME` says where each lies, its licence, and how that was verified."
    _print(Table(f"{len(rows)} releases of SAEs on the residual stream", columns, rows, caption), options.markdown)


def show(options: argparse.Namespace) -> None:
    """Describe a release of the catalogue, or a file or folder on this machine, without a download."""
    if Path(options.source).expanduser().exists():
        for table in _local_tables(Path(options.source).expanduser(), options.layer, options.k):
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
        ["licence", entry.licence],
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


def _local_tables(path: Path, layer: int | None, k: int | None) -> list[Table]:
    """The weights in a folder, and the SAE of `layer`, or the only one, from its headers alone."""
    path = path.absolute()
    found = weights_in(path) if path.is_dir() else []
    listing = Table(
        f"SAEs in {path}",
        ["layer", "file", "size"],
        [[layer_in_path(f"{path.as_posix()}/{name}"), name, in_words((path / name).stat().st_size)] for name in found],
    )
    if len(found) > 1 and layer is None:
        return [listing]
    return [*[listing] * (len(found) > 1), _file_table(path, layer, k)]


def _file_table(path: Path, layer: int | None, k: int | None) -> Table:
    from qscope_posttrain.sae.loading import activation_of, layer_of, open_source

    located, stored = open_source(path, layer, None, None, None)
    d_sae, d_model = stored.W_enc.shape
    number = layer_of(located, stored)
    try:
        activation = check.describe_activation(activation_of(located, stored, k))
    except ValueError as error:
        activation = f"not known: {str(error).rpartition(': ')[2]}"
    origin = stored.origin
    rows = [
        ["file", f"{located.path} ({in_words(located.path.stat().st_size)})"],
        ["format", stored.format],
        ["layer", "not stated" if number is None else f"{number}, counted from 0"],
        ["latents", f"{d_sae} for a residual stream of width {d_model} ({d_sae / d_model:.3g} a dimension)"],
        ["activation", activation],
        ["stored as", str(stored.W_enc.dtype).removeprefix("torch.")],
        ["release", located.release.name if located.release else "not stated"],
        ["made from", "not stated" if origin is None else str(origin)],
    ]
    return Table(located.path.name, ["what", "it is"], rows, "Headers only; `qscope sae check` reads and measures it.")


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


def build_parser() -> CommandParser:
    """The parser of `qscope sae`, but for `train`, which has its own."""
    parser = CommandParser(prog="qscope sae")
    every = parser.command("list", list_releases, "list the published SAEs that can be used by name")
    every.add_argument("--model", help="only those for this model: hub id, or a part of it such as qwen3-8b")
    one = parser.command("show", show, "describe a release, file or folder; downloads nothing")
    one.add_argument("source", help="name or hub id in the catalogue, file or folder")
    one.add_argument("--layer", type=int, help="layer number from 0")
    add_shared(one, "k")
    for action in (every, one):
        add_shared(action, "markdown")
    check.add_options(parser.command("check", check.check, "load an SAE, and measure on text whether it fits a model"))
    convert.add_options(parser.command("convert", convert.convert, "write an SAE in another format"))
    parser.command("train", list_releases, "train SAEs for several layers of a model in one stream", add_help=False)
    return parser
