"""Train SAEs for many layers of a model in one pass over text: stream, update, checkpoint, measure.

Each block of text is read once, its activations stay in memory, and all layers take their updates from it in turn. The
run can be killed at any moment: a checkpoint holds weights, optimizer, counters and the position in the text. Resuming
reads the block again, and gives the same bits as a run that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from qscope_posttrain.distributed import default_reduce, is_main_process, process_rank
from qscope_posttrain.errors import naming_what_is_kept
from qscope_posttrain.models.layers import check_layers, decoder_layers
from qscope_posttrain.provenance import model_identity, model_shape, text_fingerprint
from qscope_posttrain.report.progress import progress, status
from qscope_posttrain.report.summary import writable_folder
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.download import in_words
from qscope_posttrain.sae.quality import measure_sae
from qscope_posttrain.sae.training.activation_stream import ActivationStream
from qscope_posttrain.sae.training.config import RunConfig, SAETrainingConfig, StreamConfig
from qscope_posttrain.sae.training.parameters import calibrate
from qscope_posttrain.sae.training.records import (
    SAETrainingResult,
    TrainingLog,
    TrainingState,
    checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from qscope_posttrain.sae.training.text_stream import open_source
from qscope_posttrain.sae.training.update import LayerTraining

CHECKPOINTS = "checkpoints"


def train_saes_on_text(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    layers: Sequence[int],
    config: SAETrainingConfig,
    output: str | Path,
    stream: StreamConfig | None = None,
    run: RunConfig | None = None,
    text_column: str = "text",
) -> SAETrainingResult:
    """Train one SAE for each of `layers` on the activations of `model` on `texts`.

    Several processes (`accelerate launch`, torchrun) work on one training: each reads its share of the sequences, and
    the result is that of one process up to the order of summation.

    Args:
        model (nn.Module): Causal language model of transformers.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        texts (list of str, path, or data set): Documents, a file or folder (see `text_stream.file_source`), or a data
            set of `datasets`, also with `streaming=True`. At its end the text is read again.
        layers (sequence of int): Decoder layers, from 0.
        config (SAETrainingConfig): Settings of the training.
        output (path): Folder for metrics.jsonl and checkpoints. The SAEs are returned; `records.write_results`
            writes them.
        stream (StreamConfig, default None): How text becomes activations; None is `StreamConfig()`.
        run (RunConfig, default None): Logging, evaluation and checkpoints; None is `RunConfig()`.
        text_column (str, default "text"): The column of JSONL files and data sets that holds the documents.

    Raises:
        ValueError: settings that do not fit each other or the memory, checkpoints of other settings, activations that
            are not finite, a training that diverges.

    Example:
        >>> documents = 4 * [line for lines in texts.values() for line in lines]
        >>> config = qp.SAETrainingConfig(width=128, k=8, steps=4, batch_tokens=64)
        >>> result = qp.train_saes_on_text(model, tokenizer, documents, [2, 3], config, folder)
        >>> sorted(result.saes)
        [2, 3]
    """
    stream = StreamConfig() if stream is None else stream
    run = RunConfig() if run is None else run
    folder, source = writable_folder(output), open_source(texts, text_column)
    held_out = list(islice(source.documents(), run.held_out_documents))
    layers, first = sorted(check_layers(model, layers)), len(held_out)
    activations = ActivationStream(
        model, tokenizer, source, layers, stream, config.batch_tokens, config.seed, first_document=first
    )
    with naming_what_is_kept(lambda: _kept(folder)):
        return _Run(activations, held_out, config, run, folder).train()


def _kept(folder: Path) -> str:
    found = checkpoints(folder / CHECKPOINTS)
    return f"'{found[-1]}' is the last checkpoint: the same command goes on from it." if found else ""


class _Run:
    def __init__(
        self, stream: ActivationStream, held_out: list[str], config: SAETrainingConfig, run: RunConfig, output: Path
    ) -> None:
        self.stream, self.held_out, self.config, self.run, self.output = stream, held_out, config, run, output
        layers, d_model = stream.layers, stream.d_model
        state = config.latents(d_model) * (2 * d_model + 2) * 4
        buffer = stream.config.buffer_bytes(len(layers), d_model, stream.processes)
        status(
            f"memory per process: activations {in_words(buffer)}, weights and optimizer "
            f"{in_words(3 * state * len(layers))}, gradient {in_words(state)}; "
            f"reads {stream.config.block_tokens:,} tokens before the first step and after every "
            f"{stream.updates_per_block:,} steps"
        )
        self.settings = {
            **asdict(config),
            **{f"stream.{name}": value for name, value in asdict(stream.config).items()},
            "layers": list(layers),
            "model": model_shape(stream.model),
            "data": stream.source.facts,
            "held_out_documents": run.held_out_documents,
            "held_out": text_fingerprint({"held out": held_out}),
        }
        self.trainings: dict[int, LayerTraining] = {}
        self.update = 0  # Updates drawn from the block in memory
        self.seconds = 0.0

    def train(self) -> SAETrainingResult:
        started = time.monotonic()
        done = self._resume()
        log = TrainingLog(self.output, self.run.report_to, self.settings, done)
        steps = progress(
            self._steps(done),
            total=self.config.steps - done,
            description=f"training SAEs of layer {', '.join(map(str, self.stream.layers))}",
            note=lambda: log.note,
        )
        for step in steps:
            for layer, training in self.trainings.items():
                batch = self.stream.batch(layer, self.update - 1)
                log.add(layer, training.update(batch.rows, batch.tokens, step, default_reduce()))
            finished = step + 1
            spent = self.seconds + time.monotonic() - started
            if finished % self.run.log_every == 0 or finished == self.config.steps:
                tokens, rate, k = finished * self.config.batch_tokens, self.config.rate(step), self.config.k_at(step)
                epoch = self.stream.end.epoch
                log.record(finished, tokens=tokens, learning_rate=rate, k=k, epoch=epoch, seconds=spent)
            if self.run.evaluate_every and finished % self.run.evaluate_every == 0 and finished < self.config.steps:
                log.evaluation(finished, self._measure(self._saes()))
            if self.run.checkpoint_every and finished % self.run.checkpoint_every == 0:
                self._checkpoint(finished, spent)
        self.seconds += time.monotonic() - started
        saes = self._saes()
        quality = self._measure(saes)
        if quality and "held_out" not in log.records[-1]:  # of a run that was complete, and is run again
            log.evaluation(self.config.steps, quality)
        log.close()
        return SAETrainingResult(saes, quality, log.records, self._facts())

    def _steps(self, done: int) -> Iterator[int]:
        """Numbers of the updates; the block of each is in memory when it is yielded."""
        for step in range(done, self.config.steps):
            if self.update == self.stream.updates_per_block or self.stream.block < 0:
                self.stream.fill()
                self.update = 0
            if not self.trainings:
                for layer in self.stream.layers:
                    units = calibrate(layer, self.stream.calibration_rows(layer), default_reduce())
                    self.trainings[layer] = LayerTraining(layer, units, self.config)
            self.update += 1
            yield step

    def _resume(self) -> int:
        """Resume from the last checkpoint, if there is one and it is wanted. Returns the number of finished updates."""
        found = checkpoints(self.output / CHECKPOINTS) if self.run.resume else []
        if not found:
            return 0
        place = found[-1]
        blocks = decoder_layers(self.stream.model)
        devices = {layer: next(blocks[layer].parameters()).device for layer in self.stream.layers}
        state, self.trainings = read_checkpoint(place, self.settings, self.config, devices)
        status(f"resuming from {place}")
        self.stream.medians, self.stream.left_out = state.medians, dict(state.left_out)
        self.seconds, self.update = state.seconds, state.update
        self.stream.go_to(state.block, state.position)
        if state.step < self.config.steps:
            self.stream.fill()
        return state.step

    def _checkpoint(self, step: int, seconds: float) -> None:
        """Rank 0 writes; the others wait, so that none is ahead of the state that can be resumed."""
        if is_main_process():
            stream = self.stream
            left_out = stream.left_out_before
            state = TrainingState(step, stream.block, self.update, stream.start, stream.medians, left_out, seconds)
            write_checkpoint(self.output / CHECKPOINTS, state, self.trainings, self.settings, self.run.keep_checkpoints)
        if process_rank()[1] > 1:
            dist.barrier()

    def _saes(self) -> dict[int, SparseAutoencoder]:
        return {layer: training.finished() for layer, training in self.trainings.items()}

    def _measure(self, saes: Mapping[int, SparseAutoencoder]) -> dict[int, dict[str, Any]]:
        """Quality on held-out text by layer. Every process measures all of it."""
        quality: dict[int, dict[str, Any]] = {}
        stream, config = self.stream, self.stream.config
        limits: dict[str, Any] = {"max_length": config.context_length, "tokens_per_batch": config.forward_tokens}
        limits |= {"outlier_factor": config.outlier_factor, "scan": 0}
        for layer, sae in saes.items() if self.held_out else ():
            found = measure_sae(stream.model, stream.tokenizer, self.held_out, sae, layer, **limits)
            quality[layer] = {
                "tokens": found.tokens,
                "fvu": found.fvu.estimate,
                "l0": found.l0.estimate,
                "dead": float(self.trainings[layer].dead().float().mean()),
                "silent_on_held_out": found.dead_share,
                **{f"loss_{name}": interval.estimate for name, interval in found.losses.items()},
                **{f"loss_recovered_of_{name}_ablation": value.estimate for name, value in found.recovered.items()},
            }
        return quality

    def _facts(self) -> dict[str, Any]:
        stream, end = self.stream, self.stream.end
        return {
            "model": model_identity(stream.model),
            "data": {
                **stream.source.facts,
                "documents": end.document,
                "epochs": end.epoch,
                "fingerprint": end.digest,
                "held_out_documents": len(self.held_out),
                "held_out_fingerprint": self.settings["held_out"],
            },
            "packing": stream.config.packing,
            "tokens": self.config.steps * self.config.batch_tokens,
            "median_norms": {str(layer): value for layer, value in stream.medians.items()},
            "outliers_left_out": {str(layer): value for layer, value in stream.left_out.items()},
            "processes": stream.processes,
            "seconds": self.seconds,
        }
