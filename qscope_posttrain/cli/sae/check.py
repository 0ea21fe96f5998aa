"""`qscope sae check`: load an SAE, compare it with the model, and measure on text how well it fits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.options import chosen, load
from qscope_posttrain.cli.parsing.table import MODEL
from qscope_posttrain.errors import require_extra
from qscope_posttrain.models.loading import choose_device, load_config, parse_layers
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae import catalog
from qscope_posttrain.text.inputs import read_texts

if TYPE_CHECKING:
    from qscope_posttrain.report.html import Section
    from qscope_posttrain.sae.activations import Activation
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder
    from qscope_posttrain.sae.quality import SAEQuality

OPTIONS = f"""
source: text  # file, folder, name in the catalog, or hub id
{MODEL}
--layer: text+  # layer numbers from 0, or ranges such as 20-27; by default what the SAE says
--texts optional
--output optional
--k
--sae-revision: text  # branch, tag or commit of the SAE on the hub
--sae-device: text  # device on which the SAE computes; by default the model's
--input-scale
--scan: int = 1  # neighboring layers on either side to try the SAE on
--loss: yes|no = yes  # measure the loss with the reconstruction spliced in: four forward passes instead of one
--max-texts = 200
--max-length
--tokens-per-batch = 2048
--seed  # seed of the bootstrap intervals
"""
FAILED = 1
HARMLESS = ("tuning",)
"""Kinds of warnings that do not make the check fail."""


def check(options: argparse.Namespace) -> int:
    """Load an SAE, and measure on text whether it fits a model; status 1 where the figures say that it does not."""
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder
    from qscope_posttrain.sae.quality import measure_sae

    if options.output is not None:
        require_extra("report")
    output = None if options.output is None else writable_folder(options.output)
    texts = None if options.texts is None else read_texts(options.texts, options.max_texts)
    config = load_config(options.model, options.revision).get_text_config(decoder=True)
    d_model, depth = int(config.hidden_size), int(config.num_hidden_layers)
    place = choose_device(options.sae_device) if options.sae_device else None
    layers: Sequence[int | None] = [None] if options.layer is None else parse_layers(options.layer, depth)
    loading = {"revision": options.sae_revision, "d_model": d_model, "input_scale": options.input_scale}
    settings = chosen(options, "scan", "tokens_per_batch", "max_length", "seed")
    tables: list[list[Table]] = []
    measured: list[SAEQuality] = []
    model: Any = None
    tokenizer: Any = None
    for layer in layers:
        sae = SparseAutoencoder.load(options.source, layer, options.k, **loading)
        tables.append([_description(sae)])
        tables[-1][0].print()
        if texts is not None:
            if model is None:  # after the first SAE, so that a wrong path or width shows within seconds
                model, tokenizer = load(options)
            sae = sae.to(device=place or model.device)
            number = sae.layer if layer is None else layer
            entry = None if Path(options.source).expanduser().exists() else catalog.find(options.source)
            settings["expected_l0"] = None if entry is None or number is None else entry.expected_l0(number)
            found = measure_sae(model, tokenizer, texts, sae, layer, losses=options.loss, **settings)
            measured.append(found)
            tables[-1] += _tables(found)
            for table in tables[-1][1:]:
                table.print()
    if output is not None:
        _write(options, output, tables, measured)
    if texts is None:
        status(f"the width is that of the model ({d_model}); with --texts, the fit is measured")
        return 0
    wrong = sum(warning.kind not in HARMLESS for found in measured for warning in found.warnings)
    status("the figures show nothing wrong" if not wrong else f"{wrong} warnings: see the tables")
    return FAILED if wrong else 0


def _description(sae: SparseAutoencoder) -> Table:
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


def describe_activation(activation: Activation) -> str:
    """In words: TopK, k 50."""
    from qscope_posttrain.sae.activations import BatchTopK, TopK

    if isinstance(activation, TopK):
        return f"TopK, k {activation.k}" + (", signed" if activation.variant == "signed" else "")
    if isinstance(activation, BatchTopK):
        return f"BatchTopK, threshold {activation.threshold:.4g}"
    return type(activation).__name__


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
    options: argparse.Namespace, output: Path, tables: Sequence[Sequence[Table]], measured: Sequence[SAEQuality]
) -> None:
    from qscope_posttrain.provenance import package_versions
    from qscope_posttrain.report.html import write_html

    results = {"layers": [found.to_dict() for found in measured], "tables": tables}
    summary = write_summary(output, "sae check", vars(options), results)
    if not measured:
        status(f"written to {summary}")
        return
    sections = [_section(found, shown) for found, shown in zip(measured, tables, strict=True)]
    title, subtitle = "How well the SAE fits", f"{options.source} on {options.model}"
    page = write_html(output / "report.html", title, sections, subtitle, package_versions())
    status(f"written to {summary} and {page}")


def _section(found: SAEQuality, tables: Sequence[Table]) -> Section:
    from qscope_posttrain.report.html import Figure, Section
    from qscope_posttrain.report.plots import Curve, line_curves

    figures = []
    if len(found.fit.layers) > 2:
        curve = Curve("this SAE", list(found.fit.layers), list(found.fit.layers.values()))
        figures.append(Figure(line_curves([curve], "layer", "FVU"), "The SAE on neighboring layers, on a sample."))
    reasons = "\n".join(f"- **{warning.kind}**: {warning.reason}" for warning in found.warnings)
    verdict = reasons or "The figures show nothing wrong with units, layer, model or sparsity."
    return Section(f"Layer {found.layer}", verdict, tables=tables, figures=figures)
