"""`qscope sae list`, `show`, `check`, `convert` and `train`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.parsing.recipes import split_arguments
from qscope_posttrain.cli.sae import check
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.loading import parse_layers
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae import catalog
from qscope_posttrain.sae.catalog import CatalogEntry
from qscope_posttrain.sae.download import in_words
from qscope_posttrain.sae.layout import layer_in_path, ranges, weights_in

if TYPE_CHECKING:
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder


LIST = """
--model: text  # only those for this model: hub id, or a part of it such as qwen3-8b
--markdown
"""
SHOW = """
source: text  # name or hub id in the catalog, file or folder
--layer: int  # layer number from 0
--k --markdown
"""
CONVERT = """
source: text  # file, folder, name in the catalog, or hub id
--to: native|sae_lens|qwen_scope required  # format to write; qwen_scope holds only TopK
--output  # folder; for qwen_scope its name must say what the files do not: SAE-Res-<model>-W<latents/1024>K-L0_<k>
--layers optional  # layer numbers from 0, ranges such as 20-27, or all; by default what a folder holds
--k
--revision  # branch, tag or commit of the SAE on the hub
--input-scale
"""
_ANY_LAYER = 1 << 16


def run(arguments: Sequence[str]) -> int:
    """Run the sub-command and return the exit status."""
    if split_arguments(arguments)[0][:1] == ["train"]:
        rest = list(arguments)
        rest.remove("train")
        exit_status: int = importlib.import_module("qscope_posttrain.cli.sae.train").run(rest)
        return exit_status
    return build_parser().run(arguments)


def list_releases(options: argparse.Namespace) -> None:
    """List the published SAEs that can be used by name, of all models or one."""
    entries = catalog.entries() if options.model is None else catalog.for_model(options.model)
    if not entries:
        known = sorted({entry.backbone for entry in catalog.entries()})
        raise UserValueError(f"no SAE for a model named '{options.model}'; there are some for {', '.join(known)}.")
    rows: list[list[str | int]] = []
    for entry in entries:
        shape: list[str | int] = [_layers(entry), entry.d_model, entry.d_sae, _sparsity(entry)]
        rows.append([entry.name, entry.backbone, *shape, in_words(entry.layer_bytes)])
    columns = ["name", "model", "layers", "d_model", "latents", "L0", "size per layer"]
    caption = "`qscope sae show NAME` says where each lies, its license, and how that was verified."
    table = Table(f"{len(rows)} releases of SAEs on the residual stream", columns, rows, caption)
    table.print(markdown=options.markdown)


def show(options: argparse.Namespace) -> None:
    """Describe a release of the catalog, or a file or folder on this machine, without a download."""
    if Path(options.source).expanduser().exists():
        for table in _local_tables(Path(options.source).expanduser(), options.layer, options.k):
            table.print(markdown=options.markdown)
        return
    entry = catalog.find(options.source)
    if entry is None:
        close = catalog.suggestions(options.source)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserValueError(
            f"'{options.source}' is neither on this machine nor in the catalog (`qscope sae list`).{hint} "
            "Other repositories of the hub are read by `qscope sae check` and `qscope sae convert`."
        )
    rows = [
        ["release", f"{entry.family}: {entry.name}"],
        ["repository", entry.repository],
        ["model", f"{entry.backbone} ({entry.tuning}), {entry.model_layers} layers of width {entry.d_model}"],
        ["class in transformers", f"{entry.model_class} (model_type {entry.model_type})"],
        ["latents", f"{entry.d_sae} ({entry.d_sae / entry.d_model:.3g} per dimension)"],
        ["active per token", _sparsity(entry)],
        ["layers", _layers(entry)],
        ["site", f"{entry.site}: the output of these decoder layers, counted from 0"],
        ["files", ", ".join((entry.file, *entry.companions))],
        ["size", f"{in_words(entry.layer_bytes)} per layer, uncompressed"],
        ["format", entry.format],
        ["license", entry.license],
        ["facts from", entry.verified_by],
    ]
    Table(entry.name, ["what", "it is"], rows).print(markdown=options.markdown)
    if options.layer is not None:
        rows = [["files", ", ".join(entry.files_of(options.layer))]]
        taken, expected = entry.l0_of(options.layer), entry.expected_l0(options.layer)
        if taken is not None:
            rows.append(["L0s to choose from", ", ".join(entry.choices[options.layer])])
            rows.append(["this one as a name", f"{entry.name}-l0-{taken}"])
        rows.append(["latents active per token", "not stated" if expected is None else f"{expected:.3g}"])
        Table(f"Layer {options.layer}", ["what", "it is"], rows).print(markdown=options.markdown)


def convert(options: argparse.Namespace) -> None:
    """Write an SAE in another format, layer by layer, and read each back to compare."""
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

    output = writable_folder(options.output)
    rows = []
    for layer in _layers_to_convert(options.source, options.layers):
        sae = SparseAutoencoder.load(
            options.source, layer, options.k, revision=options.revision, input_scale=options.input_scale
        )
        place = output
        if options.to == "native":
            place /= "sae.safetensors" if sae.layer is None else f"layer{sae.layer}.sae.safetensors"
        elif options.to == "sae_lens" and sae.layer is not None:
            place /= f"blocks.{sae.layer}.hook_resid_post"
        place = sae.save(place, format=options.to)
        _check_equal(sae, SparseAutoencoder.load(place, sae.layer, checksum=False), place)
        size = sum(file.stat().st_size for file in ([place] if place.is_file() else place.iterdir()))
        rows.append([sae.layer, str(sae.source), str(place), in_words(size)])
        status(f"{place} written, and read back as the same SAE")
    table = Table(f"Converted to {options.to}", ["layer", "from", "to", "size"], rows)
    table.print()
    write_summary(output, "sae convert", vars(options), {"table": table})


def _local_tables(path: Path, layer: int | None, k: int | None) -> list[Table]:
    """The weights in a folder, and the SAE of `layer`, or the only one, from its headers alone."""
    from qscope_posttrain.sae.loading import activation_of, open_source

    path = path.absolute()
    found = weights_in(path) if path.is_dir() else []
    files = [
        [layer_in_path(f"{path.as_posix()}/{name}"), name, in_words((path / name).stat().st_size)] for name in found
    ]
    listing = [Table(f"SAEs in {path}", ["layer", "file", "size"], files)] if len(files) > 1 else []
    if listing and layer is None:
        return listing
    stored = open_source(path, layer)
    located, d_sae, d_model = stored.located, stored.d_sae, stored.d_model
    try:
        activation = check.describe_activation(activation_of(stored, k))
    except ValueError as error:
        activation = f"not known: {str(error).rpartition(': ')[2]}"
    origin = stored.origin
    rows = [
        ["file", f"{located.path} ({in_words(located.path.stat().st_size)})"],
        ["format", stored.format],
        ["layer", "not stated" if stored.layer is None else f"{stored.layer}, counted from 0"],
        ["latents", f"{d_sae} for a residual stream of width {d_model} ({d_sae / d_model:.3g} per dimension)"],
        ["activation", activation],
        ["stored as", str(stored.W_enc.dtype).removeprefix("torch.")],
        ["release", located.release.name if located.release else "not stated"],
        ["made from", "not stated" if origin is None else str(origin)],
    ]
    caption = "Headers only; `qscope sae check` reads and measures it."
    return [*listing, Table(located.path.name, ["what", "it is"], rows, caption)]


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


def _layers_to_convert(source: str, words: list[str] | None) -> list[int | None]:
    """The layers to convert; [None] for a file, or what holds no more than one."""
    path = Path(source).expanduser()
    if path.is_dir():
        numbers = {layer_in_path(f"{path.absolute().as_posix()}/{name}") for name in weights_in(path)}
        held = sorted(number for number in numbers if number is not None)
    else:
        entry = None if path.exists() else catalog.find(source)
        held = [] if entry is None else list(entry.layers)
        if entry is not None and words is None and len(held) > 1:
            raise UserValueError(
                f"{entry.name} has {len(held)} layers of {in_words(entry.layer_bytes)}: say which ones with --layers, "
                "for example --layers 20 or --layers all."
            )
    if words is None or words == ["all"]:
        return list(held) or [None]
    wanted = parse_layers(words, _ANY_LAYER)
    missing = sorted(set(wanted) - set(held))
    if held and missing:
        raise UserValueError(f"{source} has no layer {ranges(missing)}; it holds the layers {ranges(held)}.")
    return list(wanted)


def _check_equal(first: SparseAutoencoder, second: SparseAutoencoder, place: Path) -> None:
    import torch

    same = all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    x = torch.randn(4, first.d_model, generator=torch.Generator().manual_seed(0)) * first.W_enc.norm(dim=1).mean()
    codes = [sae.encode(x.to(sae.dtype)) for sae in (first, second)]
    if not same or not torch.equal(first.decode(*codes[0]), second.decode(*codes[1])):
        raise UserValueError(f"{place} was written, but reads back as another SAE than {first.source}: do not use it.")


def build_parser() -> CommandParser:
    """The parser of `qscope sae`, but for `train`, which has its own."""
    parser = CommandParser(prog="qscope sae")
    parser.command(list_releases, LIST, name="list")
    parser.command(show, SHOW)
    parser.command(check.check, check.OPTIONS)
    parser.command(convert, CONVERT)
    says = "Train SAEs for several layers of a model in one stream over text, from a recipe."
    parser.command(list_releases, name="train", help=says, add_help=False)
    return parser
