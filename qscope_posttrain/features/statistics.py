"""One streaming pass over texts: exact sums of the residual stream and of all SAE features, per layer and language."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.distributed import default_reduce, process_rank
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.sums import LayerSums, PassCheckpoint, check_sums_fit, describe_sae, sequence_fingerprint
from qscope_posttrain.models import batches
from qscope_posttrain.models.batches import Text
from qscope_posttrain.models.calibration import calibrate, calibration_sample, layer_rows
from qscope_posttrain.models.layers import check_layers, evaluation_mode, text_config
from qscope_posttrain.provenance import model_identity, model_shape, text_fingerprint, weights_fingerprint
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


@dataclass(frozen=True, eq=False)
class LayerStatistics(LayerSums):
    """The finished sums of one layer, on the CPU. L languages, d = d_model, S = d_sae."""

    median_norm: float  # Median L2 norm of the residual vectors in the calibration sample

    @property
    def mean_residual(self) -> Tensor:
        """[L, d] fp64."""
        return self.residual_sum / self.tokens[:, None]

    @property
    def mean_activation(self) -> Tensor:
        """[L, S] mean post-activation over tokens, fp64: mu_s^L of the SASFT paper."""
        return _require_sae(self.activation_sum) / self.tokens[:, None]

    @property
    def firing_rate(self) -> Tensor:
        """[L, S] share of tokens on which a feature is active, fp64."""
        return _require_sae(self.firing_count) / self.tokens[:, None]

    def counts_only(self) -> LayerStatistics:
        """The same without the sums that take memory: second moments and activations."""
        return replace(self, residual_second_moment=None, activation_sum=None, firing_count=None)

    def moments(self, rows: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean [L, F] and covariance [L, F, F] of `h @ rows.T + bias` per language, fp64, exact.

        mean = R m + b and covariance = R (E[h h'] - m m') R' with m the mean residual. Without second moments the
        covariance is NaN, which means "not measured".
        """
        rows = rows.cpu().double()
        mean = self.mean_residual @ rows.T
        if self.residual_second_moment is None:
            covariance = torch.full((len(mean), len(rows), len(rows)), math.nan, dtype=torch.float64)
        else:
            second = torch.einsum("fd,lde,ge->lfg", rows, self.residual_second_moment, rows)
            covariance = second / self.tokens[:, None, None] - torch.einsum("lf,lg->lfg", mean, mean)
        return (mean if bias is None else mean + bias.cpu().double()), covariance


@dataclass(frozen=True, eq=False)
class PassStatistics:
    """Statistics of one pass, with its model, texts and settings."""

    model: Mapping[str, Any]  # Identity of the model (see `provenance.model_identity`)
    languages: tuple[str, ...]
    layers: Mapping[int, LayerStatistics]
    texts: Tensor  # [L] int64: texts read
    skipped: Tensor  # [L] int64: tokens before the first that counts: the first of a text, or the context
    settings: Mapping[str, Any]
    text_fingerprint: str


def collect_statistics(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[Text]],
    saes: Mapping[int, SparseAutoencoder | None],
    *,
    tokens_per_batch: int = 4096,
    max_length: int = 512,
    outlier_factor: float = 10.0,
    ignored_tokens: Collection[int] = (),
    second_moments: bool = True,
    max_sums_gib: float = 8.0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    keep_checkpoint: bool = False,
    show_progress: bool | None = None,
) -> PassStatistics:
    """Run the model once over all texts, up to the deepest layer in `saes`, and sum up the states of its layers.

    Sums are fp64: they do not depend on the order of the texts, and on the batches only through the model's rounding.
    Left out and counted are the first token of every text (or the context of a `TokenText`), and tokens whose residual
    norm exceeds `outlier_factor` times the layer's median, which comes from a sample chosen by a hash of the texts.

    With torch.distributed initialized, every process must call this with the same arguments and a whole copy of the
    model; it reads its share of the batches, and all of them return the sums over all processes.

    Args:
        texts: {language: texts}: strings, to which the tokenizer adds its own special tokens, or token ids as they are.
        saes: {layer: SAE}, layers counted from 0; None to measure the residual stream only.
        tokens_per_batch: tokens in a forward pass, padding included.
        max_length: texts are cut after this many tokens (at most the model's max_position_embeddings).
        ignored_tokens: token ids that do not count wherever they stand, for example the most frequent ones.
        second_moments: needed for standard deviations and covariances; costs L * d * d * 8 bytes per layer.
        max_sums_gib: refuse to start when the sums of all layers need more than this, in GiB.
        checkpoint: file for the sums, written every `checkpoint_every` batches (with several processes one each). The
            same pass resumes from it; any other starts from the beginning and reports it. Deleted at the end, or with
            `keep_checkpoint` whole, for a caller with more to do that may be interrupted, who deletes it.
    """
    languages = batches.check_texts(texts)
    layers = check_layers(model, sorted(saes))
    d_model = int(text_config(model).hidden_size)
    for layer in layers:
        _check_sae(layer, saes[layer], d_model)
    if not outlier_factor > 1:
        raise UserValueError(f"outlier_factor must exceed 1, got {outlier_factor}.")
    if checkpoint_every < 1:
        raise UserValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}.")
    widths = {layer: (sae.d_sae if sae is not None else 0) for layer, sae in saes.items()}
    check_sums_fit(len(languages), d_model, widths, second_moments, max_sums_gib)

    max_length = batches.longest_allowed(model, max_length)
    sequences = batches.tokenize_texts(tokenizer, texts, max_length, ignored=ignored_tokens)
    pad_id, parts = batches.pad_token(tokenizer), calibration_sample(sequences)
    sample, rest = (batches.token_batches(part, tokens_per_batch, pad_id) for part in parts)
    settings: dict[str, Any] = {"tokens_per_batch": tokens_per_batch, "max_length": max_length}
    settings |= {"outlier_factor": outlier_factor, "second_moments": second_moments}
    if ignored_tokens:
        settings["ignored_tokens"] = sorted(ignored_tokens)
    rank, processes = process_rank()
    with evaluation_mode(model):
        calibration = calibrate(model, layers, sample)
        limits = {layer: outlier_factor * median for layer, median in calibration.medians.items()}
        sums = {
            layer: LayerSums.zeros(len(languages), d_model, saes[layer], second_moments, calibration.devices[layer])
            for layer in layers
        }
        key = {"model": model_shape(model), "sequences": sequence_fingerprint(sequences, languages), **settings}
        key |= {"saes": {str(layer): describe_sae(saes[layer]) for layer in layers}, "processes": processes}
        if checkpoint is not None:
            key["weights"] = weights_fingerprint(model)
        saved = PassCheckpoint(checkpoint, key, calibration.medians, rank, processes)
        done = saved.resume(sums)
        if done == 0 and rank == 0:  # every process has read the sample; it counts once
            for layer, rows, groups in calibration.rows:
                sums[layer].add(rows, groups, limits[layer], saes[layer])
        calibration.rows.clear()
        mine = rest[rank::processes]
        shown = progress(mine[done:], description=f"statistics of {len(layers)} layers", enabled=show_progress)
        for number, batch in enumerate(shown, start=done + 1):
            for layer, rows, groups in layer_rows(model, layers, batch):
                sums[layer].add(rows, groups, limits[layer], saes[layer])
            if number % checkpoint_every == 0 or number == len(mine):
                _check_finite(sums)
                if keep_checkpoint or number < len(mine):
                    saved.write(sums, number)
    reduce = default_reduce()
    for layer in layers:
        for value in sums[layer].tensors().values():
            reduce(value)
    if not keep_checkpoint:
        saved.delete()
    owners = torch.tensor([sequence.language for sequence in sequences])
    skipped = torch.tensor([min(sequence.start, len(sequence.ids)) for sequence in sequences])
    return PassStatistics(
        model=model_identity(model),
        languages=languages,
        layers={layer: _finished(layer, sums[layer], calibration.medians[layer], languages) for layer in layers},
        texts=owners.bincount(minlength=len(languages)),
        skipped=owners.bincount(skipped, minlength=len(languages)).long(),
        settings=settings,
        text_fingerprint=text_fingerprint({name: map(batches.describe_text, found) for name, found in texts.items()}),
    )


def _check_sae(layer: int, sae: SparseAutoencoder | None, d_model: int) -> None:
    if sae is not None and sae.d_model != d_model:
        raise UserValueError(
            f"The SAE for layer {layer} has d_model {sae.d_model}, the model's hidden size is {d_model}: "
            "it belongs to another model."
        )
    if sae is not None and sae.layer not in (None, layer):
        raise UserValueError(f"The SAE given for layer {layer} was trained on layer {sae.layer}.")


def _check_finite(sums: Mapping[int, LayerSums]) -> None:
    for layer, found in sums.items():
        if not bool(found.residual_sum.isfinite().all()):
            raise UserValueError(
                f"The activations of layer {layer} are not numbers (NaN): the weights of the model are damaged, or its "
                "dtype is too narrow (--dtype)."
            )


def _finished(layer: int, sums: LayerSums, median_norm: float, languages: Sequence[str]) -> LayerStatistics:
    empty = [language for language, tokens in zip(languages, sums.tokens.tolist(), strict=True) if tokens == 0]
    if empty:
        raise UserValueError(
            f"Layer {layer}: every token of language {empty[0]!r} was left out as a norm outlier. Give more text, or "
            "raise outlier_factor."
        )
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(sums))
    values |= {name: value.cpu() for name, value in sums.tensors().items()}
    return LayerStatistics(**values, median_norm=median_norm)


def _require_sae(value: Tensor | None) -> Tensor:
    if value is None:
        raise UserValueError("No SAE was given for this layer, so there are no activations of features.")
    return value
