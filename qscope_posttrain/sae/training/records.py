"""The files of a training of SAEs: while it runs checkpoints to resume from and a log, at its end SAEs and a report.

A checkpoint is a folder `step-<n>` with one safetensors file per layer (weights, optimizer, counters) and `state.json`,
which holds the position in the text; no activations. It gets its name when it is complete, so that a run that is killed
at any moment leaves only whole checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qscope_posttrain.distributed import is_main_process
from qscope_posttrain.errors import CheckpointRefused, UserValueError
from qscope_posttrain.files import read_json, read_lines, writing
from qscope_posttrain.provenance import package_versions
from qscope_posttrain.report.html import Figure, Section, write_html
from qscope_posttrain.report.summary import to_json, write_summary, write_text
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.training.config import SAETrainingConfig, StreamConfig
from qscope_posttrain.sae.training.text_stream import StreamPosition
from qscope_posttrain.sae.training.update import LayerTraining, UpdateMetrics

FORMAT = "qscope_posttrain.sae_training"
STATE = "state.json"
LOG = "metrics.jsonl"


@dataclass(frozen=True)
class TrainingState:
    """Progress of a training, without the tensors of its layers."""

    step: int  # Updates that are done
    block: int  # Number of the block of activations that the next update draws from
    update: int  # Updates drawn from that block
    position: StreamPosition  # Start of that block in the text
    medians: dict[int, float]  # Median norm of each layer
    left_out: dict[int, int]  # Norm outliers of each layer in the blocks before
    seconds: float  # Time that the training has taken


def write_checkpoint(
    folder: Path, state: TrainingState, trainings: Mapping[int, LayerTraining], settings: Mapping[str, Any], keep: int
) -> None:
    """Write `folder/step-<n>`, then delete all but the last `keep` checkpoints."""
    final = folder / f"step-{state.step:08d}"
    unfinished = folder / f".{final.name}.part"
    with writing(final):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for layer, training in trainings.items():
            tensors = {name: value.detach().cpu().contiguous() for name, value in training.tensors().items()}
            if any(bool(value.isnan().any()) for name, value in tensors.items() if name != "batch_threshold"):
                raise diverged([str(layer)], state.step)  # it must not replace a good checkpoint
            save_file(tensors, str(unfinished / f"layer{layer}.safetensors"))
        content = {"format": FORMAT, "settings": dict(settings), **asdict(state)}
        (unfinished / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for file in unfinished.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def read_checkpoint(
    place: Path, settings: Mapping[str, Any], config: SAETrainingConfig, devices: Mapping[int, torch.device]
) -> tuple[TrainingState, dict[int, LayerTraining]]:
    """Read a checkpoint of `write_checkpoint`; `devices` has the device of each layer. ValueError: a damaged
    checkpoint, or one of other settings; the message names the differences."""
    try:
        content = read_json(place / STATE)
        written, asked = content["settings"], json.loads(json.dumps(dict(settings)))
        different = [
            f"{name} was {written.get(name)!r} and is {asked.get(name)!r}"
            for name in sorted({*written, *asked})
            if written.get(name) != asked.get(name)
        ]
        state = TrainingState(
            **{name: int(content[name]) for name in ("step", "block", "update")},
            position=StreamPosition(**content["position"]),
            medians={int(layer): float(value) for layer, value in content["medians"].items()},
            left_out={int(layer): int(value) for layer, value in content["left_out"].items()},
            seconds=float(content["seconds"]),
        )
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointRefused(
            f"{place} is not a checkpoint of a training of SAEs, or is damaged ({error}): delete it"
        ) from error
    if different:
        raise CheckpointRefused(
            f"{place} belongs to another training: {'; '.join(different)}. Resume with the same settings, choose "
            "another output folder, or start again with resume: false."
        )
    trainings = {}
    for layer, device in devices.items():
        try:
            tensors = load_file(str(place / f"layer{layer}.safetensors"))
            trainings[layer] = LayerTraining.resumed(layer, tensors, config, device)
        except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
            raise CheckpointRefused(
                f"{place}: layer {layer} is missing or damaged ({error}): delete the checkpoint"
            ) from error
    return state, trainings


def diverged(layers: Sequence[str], step: int) -> UserValueError:
    """The error of layers whose loss or weights are no numbers any more."""
    return UserValueError(
        f"the training of layer {', '.join(layers)} has diverged by update {step}: lower learning_rate, or lengthen "
        "warmup_steps. The last checkpoint is from before."
    )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, that with the most updates last."""
    return sorted(place for place in folder.glob("step-*") if (place / STATE).is_file())


class TrainingLog:
    """Means over the updates since the last record. Only rank 0 writes."""

    def __init__(self, folder: Path, report_to: Sequence[str], settings: Mapping[str, Any], done: int) -> None:
        """Records after update `done` belong to a run that was killed, and are removed from the file."""
        self.path = folder / LOG
        self.note = ""
        self.records = [record for record in _read(self.path) if record["step"] <= done] if done else []
        self._sums: dict[int, Tensor] = {}  # Layer -> [2, metrics]: sums of the known values and their number
        self._accelerator = None
        if report_to:
            from accelerate import Accelerator

            plain = {key: v if isinstance(v, int | float | str | bool) else str(v) for key, v in settings.items()}
            self._accelerator = Accelerator(log_with=list(report_to), project_dir=str(folder))
            self._accelerator.init_trackers("qscope-sae", config=plain)
        if is_main_process():
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))

    def add(self, layer: int, metrics: UpdateMetrics) -> None:
        """Add one update of one layer, without waiting for the device."""
        values = torch.stack([value.float() for value in vars(metrics).values()])
        known = ~values.isnan()
        row = torch.stack([torch.where(known, values, 0.0), known.float()])
        self._sums[layer] = self._sums[layer] + row if layer in self._sums else row

    def record(self, step: int, **facts: Any) -> None:
        """Write the means as the record of update `step`, with further facts.

        Raises:
            ValueError: the loss is no longer finite.
        """
        layers: dict[str, dict[str, float | None]] = {}
        for layer, (sums, counts) in self._sums.items():
            layers[str(layer)] = dict(zip(UpdateMetrics.__dataclass_fields__, (sums / counts).tolist(), strict=True))
        self._sums = {}
        if bad := [layer for layer, means in layers.items() if not math.isfinite(means["fvu"] or 0.0)]:
            raise diverged(bad, step)
        self._write({"step": step, **facts, "layers": layers})
        mean = sum(means["fvu"] or 0.0 for means in layers.values()) / max(len(layers), 1)
        self.note = f"unexplained variance {mean:.3f}"

    def evaluation(self, step: int, quality: Mapping[int, Mapping[str, Any]]) -> None:
        """Write the measurement on held-out text after update `step`."""
        self._write({"step": step, "held_out": {str(layer): dict(figures) for layer, figures in quality.items()}})

    def close(self) -> None:
        """Let the trackers write their buffers."""
        for tracker in self._accelerator.trackers if self._accelerator is not None else ():
            tracker.finish()

    def _write(self, record: dict[str, Any]) -> None:
        record = to_json(record)
        self.records.append(record)
        if is_main_process():
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self._accelerator is not None:
            self._accelerator.log(_flat(record), step=record["step"])


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """`layers.3.fvu` becomes `layer3/fvu`; only numbers are kept."""
    flat = {key: value for key, value in record.items() if key != "step"}
    for part, prefix in (("layers", ""), ("held_out", "held_out_")):
        for layer, figures in record.get(part, {}).items():
            flat |= {f"layer{layer}/{prefix}{key}": value for key, value in figures.items()}
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run, without a last line that was cut off."""
    records: list[dict[str, Any]] = []
    for line in read_lines(path) if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


_PACKING = {
    "isolated": "Several documents share a sequence; none attends to another.",
    "joined": "Several documents share a sequence, and each attends to those before it.",
    "separate": "A sequence holds one document.",
}
_COLUMNS = ("fvu", "l0", "dead", "loss_recovered_of_mean_ablation", "loss_recovered_of_zero_ablation")


@dataclass(frozen=True, eq=False)
class SAETrainingResult:
    """Result of a training."""

    saes: dict[int, SparseAutoencoder]  # By layer, in raw units
    quality: dict[int, dict[str, Any]]  # By layer, on held-out text: fvu, l0, dead ...; empty if none
    records: list[dict[str, Any]]  # Content of metrics.jsonl
    facts: dict[str, Any]  # Model, data with its fingerprint, tokens, epochs, outliers, seconds


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
