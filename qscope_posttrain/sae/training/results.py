"""Write the results of a training of SAEs: files in two layouts, a model card, a table and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qscope_posttrain.provenance import package_versions
from qscope_posttrain.report.html import Figure, Section, write_html
from qscope_posttrain.report.summary import write_summary, write_text
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.training.config import SAETrainingConfig, StreamConfig
from qscope_posttrain.sae.training.run import SAETrainingResult

_PACKING = {
    "isolated": "Several documents share a sequence; none attends to another.",
    "joined": "Several documents share a sequence, and each attends to those before it.",
    "separate": "A sequence holds one document.",
}
_COLUMNS = ("fvu", "l0", "dead", "loss_recovered_of_mean_ablation", "loss_recovered_of_zero_ablation")


def write_results(
    folder: Path,
    result: SAETrainingResult,
    config: SAETrainingConfig,
    stream: StreamConfig,
    settings: Mapping[str, Any],
) -> Table:
    """Write everything into `folder` and return the table of the layers.

    The files are `layer{n}.sae.safetensors`; for TopK of a width in multiples of 1024 also Qwen-Scope's layout,
    `SAE-Res-<model>-W{N}K-L0_{k}/layer{n}.sae.pt`; README.md, summary.json and report.html.
    """
    for layer, sae in result.saes.items():
        sae.save(folder / f"layer{layer}.sae.safetensors")
    published = _qwen_scope_name(result, config)
    if published is not None:
        for sae in result.saes.values():
            sae.save(folder / published, format="qwen_scope")
    table = _quality_table(result)
    write_text(folder / "README.md", _model_card(result, config, stream, table, published))
    content = {"layers": result.quality, "table": table, **result.facts, "qwen_scope_layout": published}
    write_summary(folder, "sae train", settings, content)
    write_html(
        folder / "report.html",
        f"SAEs of {_model_name(result)}",
        [Section("Result", _data_words(result, stream), tables=[table]), _curves(result)],
        facts={"settings": json.dumps(dict(settings), default=str), "versions": json.dumps(package_versions())},
    )
    return table


def _qwen_scope_name(result: SAETrainingResult, config: SAETrainingConfig) -> str | None:
    """The release name in Qwen-Scope's layout, or None if that layout cannot express what was trained."""
    sae = next(iter(result.saes.values()))
    thousands, rest = divmod(sae.d_sae, 1024)
    if config.architecture != "topk" or rest or sae.d_sae == sae.d_model:
        return None
    return f"SAE-Res-{_model_name(result)}-W{thousands}K-L0_{config.k}"


def _quality_table(result: SAETrainingResult) -> Table:
    """One row per layer: the last measurement on held-out text, or else the last means of training."""
    if result.quality:
        rows = [[layer, *(figures.get(name) for name in _COLUMNS)] for layer, figures in result.quality.items()]
        tokens = next(iter(result.quality.values()))["tokens"]
        caption = f"On {tokens} tokens of held-out text. dead: of all latents, by the last updates of training."
        return Table("SAEs by layer", ["layer", *(name.replace("_", " ") for name in _COLUMNS)], rows, caption)
    last = next(record["layers"] for record in reversed(result.records) if "layers" in record)
    rows = [[int(layer), *(figures[name] for name in _COLUMNS[:3])] for layer, figures in last.items()]
    return Table("SAEs by layer", ["layer", *_COLUMNS[:3]], rows, "Means of the last updates; nothing was held out.")


def _model_card(
    result: SAETrainingResult, config: SAETrainingConfig, stream: StreamConfig, table: Table, published: str | None
) -> str:
    """The text of README.md: model, data, quality, and how to load the SAEs."""
    layer = next(iter(result.saes))
    model, data = result.facts["model"], result.facts["data"]
    settings = [[f"`{name}`", str(value)] for name, value in {**asdict(config), **asdict(stream)}.items()]
    facts = [
        ["model", str(model["name_or_path"])],
        ["model type", str(model["model_type"])],
        ["site", "output of the decoder layer, counted from 0 (residual stream, raw units)"],
        ["data", str(data.get("name") or data.get("path") or data["kind"])],
        ["data fingerprint", f"`{data['fingerprint']}` (SHA-256 chained over the documents in their order)"],
        ["held-out fingerprint", f"`{data['held_out_fingerprint']}` ({data['held_out_documents']} documents)"],
        ["tokens", str(result.facts["tokens"])],
        ["norm outliers left out, by layer", json.dumps(result.facts["outliers_left_out"])],
    ]
    code = f'sae = qp.SparseAutoencoder.load("PATH", layer={layer})'
    if published:
        code += f'\n# or in Qwen-Scope\'s layout: qp.SparseAutoencoder.load("PATH/{published}", layer={layer})'
    return f"""---
library_name: qscope_posttrain
base_model: {json.dumps(str(model["name_or_path"]))}
tags: [sparse-autoencoder, interpretability]
---
# Sparse autoencoders of {_model_name(result)}, layers {", ".join(map(str, result.saes))}

{table.to_markdown()}
```python
import qscope_posttrain as qp

{code}
values, indices = sae.encode(x)      # x [tokens, d_model], the raw output of the decoder layer
x_hat = sae.decode(values, indices)
```

{_data_words(result, stream)}

{Table("Origin", ["what", "it is"], facts).to_markdown()}
{Table("Settings", ["setting", "value"], settings).to_markdown()}"""


def _data_words(result: SAETrainingResult, stream: StreamConfig) -> str:
    epochs = result.facts["data"]["epochs"]
    again = f" The text was read to its end {epochs} times." if epochs else ""
    return (
        f"{_PACKING[stream.packing]} The first token of each document, of each piece of one that was cut, and tokens "
        f"whose norm exceeds {stream.outlier_factor:g} times the median were not trained on.{again}"
    )


def _curves(result: SAETrainingResult) -> Section:
    from qscope_posttrain.report.plots import Curve, line_curves

    records = [record for record in result.records if "layers" in record]
    tokens = [record["tokens"] for record in records]
    figures = []
    for name, label in (("fvu", "unexplained variance"), ("dead", "dead latents, share")):
        values = {n: [record["layers"][str(n)][name] for record in records] for n in result.saes}
        curves = [Curve(f"layer {layer}", tokens, values[layer]) for layer in result.saes]
        svg = line_curves(curves, "tokens", label, log_y=name == "fvu")
        figures.append(Figure(svg, f"{label}, means over the updates between two records"))
    return Section("Training", figures=figures)


def _model_name(result: SAETrainingResult) -> str:
    return Path(str(result.facts["model"]["name_or_path"])).name or str(result.facts["model"]["model_type"])
