"""`qscope sae check`: load an SAE, compare it with the model, and measure on text how well it fits."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.inputs import choose_device, load_config, load_model, parse_layers, read_texts
from qscope_posttrain.cli.options import add_model_options
from qscope_posttrain.errors import require_extra
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae import catalog

if TYPE_CHECKING:
    from qscope_posttrain.report.html import Section
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder
    from qscope_posttrain.sae.quality.measure import SAEQuality

FAILED = 1
HARMLESS = ("tuning",)
"""Kinds of warnings that do not make the check fail."""


def check(options: argparse.Namespace) -> int:
    """Print what the SAEs are and how they fit; status 1 where the figures show that something is wrong."""
    if options.output is not None:
        require_extra("report")
    output = None if options.output is None else writable_folder(options.output)
    texts = None if options.texts is None else read_texts(options.texts, options.max_texts)
    d_model, depth = _shape(options.model, options.revision)
    layers: Sequence[int | None] = [None] if options.layer is None else parse_layers(options.layer, depth)
    described: list[Table] = []
    measured: list[SAEQuality] = []
    model: Any = None
    tokenizer: Any = None
    for layer in layers:
        sae = _load(options, layer, d_model)
        described.append(_description(sae))
        described[-1].print()
        if texts is None:
            continue
        if model is None:  # after the first SAE, so that a wrong path or width shows within seconds
            model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
        measured.append(_measure(options, model, tokenizer, texts, sae, layer))
        for table in _tables(measured[-1]):
            table.print()
    if texts is None:
        status(f"the width is that of the model ({d_model}); with --texts, the fit is measured")
        return 0
    if output is not None:
        _write(options, output, described, measured)
    wrong = sum(warning.kind not in HARMLESS for found in measured for warning in found.warnings)
    status("the figures show nothing wrong" if not wrong else f"{wrong} warnings: see the tables")
    return FAILED if wrong else 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `qscope sae check`."""
    parser.add_argument("source", help="file, folder, name in the catalogue, or hub id")
    add_model_options(parser)
    parser.add_argument("--layer", nargs="+", help="numbers from 0, ranges such as 20-27; by default what the SAE says")
    parser.add_argument("--texts", help="folder of <language>.txt, or JSONL with text and language, to measure on")
    parser.add_argument("--output", help="folder for summary.json and report.html")
    parser.add_argument("--k", type=int, help="k of TopK, where neither file nor release name says it")
    parser.add_argument("--sae-revision", help="branch, tag or commit of the SAE on the hub")
    parser.add_argument("--sae-device", help="where the SAE computes; by default with the model")
    parser.add_argument("--input-scale", type=float, help="factor on the activations that a SAELens file does not hold")
    parser.add_argument("--scan", type=int, default=1, help="neighbouring layers on either side to try the SAE on")
    parser.add_argument(
        "--loss",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the loss with the reconstruction spliced in: four forwards of the model instead of one",
    )
    parser.add_argument("--max-texts", type=int, default=200, help="texts a language at most")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text at most")
    parser.add_argument("--tokens-per-batch", type=int, default=2048, help="tokens in one forward pass")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals")


def _shape(name: str, revision: str | None) -> tuple[int, int]:
    """(width, decoder layers) of a model, from its configuration alone."""
    config = load_config(name, revision).get_text_config(decoder=True)
    return int(config.hidden_size), int(config.num_hidden_layers)


def _load(options: argparse.Namespace, layer: int | None, d_model: int) -> SparseAutoencoder:
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

    return SparseAutoencoder.load(
        options.source,
        layer,
        options.k,
        revision=options.sae_revision,
        d_model=d_model,
        input_scale=options.input_scale,
    )


def _measure(
    options: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    sae: SparseAutoencoder,
    layer: int | None,
) -> SAEQuality:
    from qscope_posttrain.sae.quality.measure import measure_sae

    place = choose_device(options.sae_device) if options.sae_device else model.device
    return measure_sae(
        model,
        tokenizer,
        texts,
        sae.to(device=place),
        layer,
        scan=options.scan,
        losses=options.loss,
        expected_l0=_expected_l0(options.source, sae.layer if layer is None else layer),
        tokens_per_batch=options.tokens_per_batch,
        max_length=options.max_length,
        seed=options.seed,
    )


def _expected_l0(source: str, layer: int | None) -> float | None:
    entry = None if Path(source).expanduser().exists() or layer is None else catalog.find(source)
    return None if entry is None or layer is None else entry.expected_l0(layer)


def _description(sae: SparseAutoencoder) -> Table:
    from qscope_posttrain.cli.sae_local import describe_activation

    norms = sae.W_dec.float().norm(dim=1)
    rows = [
        ["source", str(sae.source)],
        ["format", sae.source.format],
        ["sha256", sae.source.sha256 or "not computed"],
        ["layer", "not stated" if sae.layer is None else str(sae.layer)],
        ["latents", f"{sae.d_sae} for a residual stream of width {sae.d_model}"],
        ["activation", describe_activation(sae.activation)],
        [
            "norms of directions",
            "median {:.3g}, from {:.3g} to {:.3g}".format(*map(float, (norms.median(), *norms.aminmax()))),
        ],
        ["norm of b_dec", f"{float(sae.b_dec.float().norm()):.3g}"],
    ]
    return Table("The SAE, in units of the raw residual stream", ["what", "it is"], rows)


def _tables(found: SAEQuality) -> list[Table]:
    tables = [found.to_table()]
    if len(found.by_language.rows) > 1:
        tables.append(found.by_language)
    if len(found.fit.layers) > 1:
        tables.append(found.scan_table())
    if found.warnings:
        tables.append(found.warnings_table())
    return tables


def _write(
    options: argparse.Namespace, output: Path, described: Sequence[Table], measured: Sequence[SAEQuality]
) -> None:
    from qscope_posttrain.provenance import package_versions
    from qscope_posttrain.report.html import write_html

    tables = [[about, *_tables(found)] for about, found in zip(described, measured, strict=True)]
    results = {"layers": [found.to_dict() for found in measured], "tables": tables}
    summary = write_summary(output, "sae check", vars(options), results)
    page = write_html(
        output / "report.html",
        "How well the SAE fits",
        [_section(found, shown) for found, shown in zip(measured, tables, strict=True)],
        f"{options.source} on {options.model}",
        package_versions(),
    )
    status(f"written to {summary} and {page}")


def _section(found: SAEQuality, tables: Sequence[Table]) -> Section:
    from qscope_posttrain.report.html import Figure, Section
    from qscope_posttrain.report.plots import Bar, Curve, interval_bars, line_curves
    from qscope_posttrain.sae.quality.figures import LOSS_NAMES

    figures = []
    if found.losses:
        bars = [Bar(LOSS_NAMES[name], *interval) for name, interval in found.losses.items()]
        caption = "Loss of the model as it is, and with the output of the layer replaced."
        figures.append(Figure(interval_bars(bars, "nats a token", reference=LOSS_NAMES["clean"]), caption))
    if len(found.fit.layers) > 2:
        curve = Curve("this SAE", list(found.fit.layers), list(found.fit.layers.values()))
        figures.append(Figure(line_curves([curve], "layer", "FVU"), "The SAE on neighbouring layers, on a sample."))
    reasons = "\n".join(f"- **{warning.kind}**: {warning.reason}" for warning in found.warnings)
    verdict = reasons or "The figures show nothing wrong with units, layer, model or sparsity."
    return Section(f"Layer {found.layer}", verdict, tables=tables, figures=figures)
