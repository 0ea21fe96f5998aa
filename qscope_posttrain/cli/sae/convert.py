"""`qscope sae convert`: write SAEs of any format in another, and read them back to compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qscope_posttrain.cli.options import add_shared
from qscope_posttrain.cli.sae.check import add_input_scale
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.report.tables import Table
from qscope_posttrain.residual.loading import parse_layers
from qscope_posttrain.sae import catalog
from qscope_posttrain.sae.download import in_words
from qscope_posttrain.sae.layout import layer_in_path, ranges, weights_in

if TYPE_CHECKING:
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

TARGETS = ("native", "sae_lens", "qwen_scope")
_ANY_LAYER = 1 << 16


def convert(options: argparse.Namespace) -> None:
    """Write each layer, read it back, and print its place; `summary.json` says what it was made from."""
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

    output = writable_folder(options.output)
    rows = []
    for layer in _layers(options.source, options.layers):
        sae = SparseAutoencoder.load(
            options.source, layer, options.k, revision=options.revision, input_scale=options.input_scale
        )
        place = sae.save(_place(output, options.to, sae.layer), format=options.to)
        _check_equal(sae, SparseAutoencoder.load(place, sae.layer, checksum=False), place)
        size = sum(file.stat().st_size for file in ([place] if place.is_file() else place.iterdir()))
        rows.append([sae.layer, str(sae.source), str(place), in_words(size)])
        status(f"{place} written, and read back as the same SAE")
    table = Table(f"Converted to {options.to}", ["layer", "from", "to", "size"], rows)
    table.print()
    write_summary(output, "sae convert", vars(options), {"table": table})


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `qscope sae convert`."""
    parser.add_argument("source", help="file, folder, name in the catalogue, or hub id")
    parser.add_argument("--to", choices=TARGETS, required=True, help="format to write; qwen_scope holds only TopK")
    add_shared(
        parser,
        "output",
        help="folder; for qwen_scope its name must say what the files do not: SAE-Res-<model>-W<latents/1024>K-L0_<k>",
    )
    add_shared(
        parser,
        "layers",
        required=False,
        help="layer numbers from 0, ranges such as 20-27, or all; by default what a folder holds",
    )
    add_shared(parser, "k")
    add_shared(parser, "revision", help="branch, tag or commit of the SAE on the hub")
    add_input_scale(parser)


def _layers(source: str, words: list[str] | None) -> list[int | None]:
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


def _place(output: Path, target: str, layer: int | None) -> Path:
    if target == "qwen_scope":
        return output
    if target == "sae_lens":
        return output if layer is None else output / f"blocks.{layer}.hook_resid_post"
    return output / ("sae.safetensors" if layer is None else f"layer{layer}.sae.safetensors")


def _check_equal(first: SparseAutoencoder, second: SparseAutoencoder, place: Path) -> None:
    import torch

    same = all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    x = torch.randn(4, first.d_model, generator=torch.Generator().manual_seed(0)) * first.W_enc.norm(dim=1).mean()
    codes = [sae.encode(x.to(sae.dtype)) for sae in (first, second)]
    if not same or not torch.equal(first.decode(*codes[0]), second.decode(*codes[1])):
        raise UserValueError(f"{place} was written, but reads back as another SAE than {first.source}: do not use it.")
